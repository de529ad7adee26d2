"""Words that keys of RULER's needles are made of, an adjective and a noun; the benchmark's own lists are a download."""

ADJECTIVES = (
    "amber ancient bold brave brisk calm clever cloudy crimson curious daring dusty eager early faint fancy fierce "
    "gentle giant golden grand happy hidden hollow honest humble icy jolly keen kind lazy little lively lonely loud "
    "lucky mellow merry mighty modest narrow noble odd pale patient plain polite proud quick quiet rapid rare rusty "
    "sharp shiny silent silver simple sleepy smooth solid spicy steady stormy strange sunny swift tame tidy tiny "
    "tough vivid warm wild wise young"
)
NOUNS = (
    "anchor apple arrow badge barrel basket beacon bell bird blanket boat bottle branch bridge bucket button cabin "
    "candle canyon carpet castle chair cherry circle cliff clock cloud coin compass copper corner cottage crane crown "
    "desk dragon drum eagle engine falcon feather fence field finger forest fountain garden glove hammer harbor horse "
    "island jacket journal kettle ladder lantern lemon lion magnet maple marble meadow mirror mountain needle ocean "
    "orchard otter paddle palace parrot pebble pencil pepper piano pillow planet pocket pond puzzle rabbit ribbon "
    "river rocket saddle sailor shadow shelter signal spoon squirrel statue summit table temple ticket tiger tower "
    "tunnel turtle valley violin wagon walnut window winter wolf"
)
