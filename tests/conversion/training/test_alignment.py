"""Student and teacher: one set of tensors, and losses equal to what two whole models and plain formulas give."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from conversion.data.packing import IGNORED
from conversion.grafting.report import read_report
from conversion.training.alignment import Alignment, document_groups, run_teacher
from conversion.training.settings import LossSettings
from conversion.training.student import choose_trained, hold_in_float32
from conversion.training.teacher import check_head, check_teacher, load_teacher, shared_teacher
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from modeling_bmojo.inputs_bmojo import Rows
from tests.conversion.graft_sources import SOURCES, VOCAB, W
from tests.conversion.training_setup import T, tiny_graft
from tests.tiny import SIZES


BACKBONE = "model.layers.*.self_attn.q_proj.weight"


def student_of(name="llama", train="new", **settings):
    """A graft in float64 whose new tensors are far from where they started, so that every loss has something to do."""
    folder = tiny_graft(name, **settings)
    model, report = BMojoForCausalLM.from_pretrained(folder).double(), read_report(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if ".fading." in key and "scalars" not in key:
                value.add_(torch.randn_like(value), alpha=0.3)
    trained = choose_trained(model, train, report)
    return model, report, trained


def alignment(losses, name="llama", train="new", **settings):
    model, report, trained = student_of(name, train, **settings)
    teacher = shared_teacher(model, report["source"], set(trained))
    return Alignment(model, teacher, LossSettings(**losses)).train()


def batch_of(rows=2, tokens=T, first=W):
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(tokens).repeat(rows, 1)
    return {"input_ids": ids, "labels": ids.masked_fill(positions <= first, IGNORED), "position_ids": positions}


def padded(batch, count):
    """The batch with `count` columns of pads behind it."""
    rows = len(batch["input_ids"])
    fill = {"input_ids": 0, "labels": IGNORED, "position_ids": 0}
    longer = {key: torch.cat([batch[key], torch.full((rows, count), value)], 1) for key, value in fill.items()}
    mask = torch.ones_like(batch["input_ids"])
    return {**longer, "attention_mask": torch.cat([mask, mask.new_zeros(rows, count)], 1)}


# The teacher --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [{"fading_delay": 12}, {"fading_stride": 16}], ids=str)
def test_fading_tokens_of_the_student_need_not_fit_the_window_of_the_source(memory):
    model, report, trained = student_of("mistral_sliding")
    model.config.window_size, source = 16, {**report["source"], "window": 8}
    for name, value in memory.items():
        setattr(model.config, name, value)
    model.config.validate()
    assert shared_teacher(model, source, set(trained)).config.window_size == 8


@pytest.mark.parametrize("name", ["llama", "llama_biases_tied", "qwen3", "smollm3", "mistral_sliding"])
def test_shared_teacher_is_the_source_on_the_students_tensors(name):
    model, report, trained = student_of(name)
    teacher = shared_teacher(model, report["source"], set(trained))
    own = {id(value) for value in model.parameters()}
    assert {id(value) for value in teacher.parameters()} <= own
    student_memory = {value.data_ptr() for value in (*model.parameters(), *model.buffers())}
    assert {value.data_ptr() for value in (*teacher.parameters(), *teacher.buffers())} <= student_memory
    # What the student has beyond the teacher are the graft's new tensors.
    assert set(dict(model.named_parameters())) - set(dict(teacher.named_parameters())) == set(trained)
    source = AutoModelForCausalLM.from_pretrained(tiny_graft(name).parent / "source").double().eval()
    ids = batch_of()["input_ids"]
    with torch.no_grad():
        theirs, ours = source(input_ids=ids).logits, teacher(input_ids=ids, use_cache=False).logits
        student = model.eval()(input_ids=ids, use_cache=False).logits
    # transformers' own norms and RoPE compute in float32 whatever the model's dtype.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (student - theirs).abs().max() > 1e-3


def test_tensors_that_train_are_copied_for_the_teacher_and_no_others():
    model, report, trained = student_of(train=["new", BACKBONE, "model.embed_tokens.weight"])
    teacher = shared_teacher(model, report["source"], set(trained))
    ours, theirs = dict(model.named_parameters()), dict(teacher.named_parameters())
    copied = {name for name in theirs if theirs[name].data_ptr() != ours[name].data_ptr()}
    assert copied == {name for name in trained if ".fading." not in name} and len(copied) == 3
    assert all(torch.equal(theirs[name], ours[name]) and not theirs[name].requires_grad for name in copied)
    ids = batch_of()["input_ids"]
    with torch.no_grad():
        before = teacher(input_ids=ids, use_cache=False).logits
        for name in trained:
            ours[name].add_(1.0)
        assert torch.equal(teacher(input_ids=ids, use_cache=False).logits, before)


def test_a_tied_tensor_that_trains_is_copied_once():
    model, report, trained = student_of("llama_biases_tied", train="all")
    teacher = shared_teacher(model, report["source"], set(trained))
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight
    assert teacher.lm_head.weight is not model.lm_head.weight


def test_teacher_stays_shared_when_the_module_moves_or_narrows():
    align = alignment({"kl": 1.0}, train=["new", BACKBONE])
    align.to(torch.bfloat16)
    ours, theirs = dict(align.student.named_parameters()), dict(align.teacher.named_parameters())
    assert {value.dtype for value in theirs.values()} == {torch.bfloat16}
    assert all((theirs[name] is ours[name]) == ("q_proj" not in name) for name in theirs)


def test_the_teacher_is_in_no_state_dict_and_never_trains():
    align = alignment({"kl": 1.0})
    assert all(name.startswith("student.") for name in align.state_dict())
    align.train()
    assert align.student.training and not align.teacher.training


def test_a_report_without_the_sources_layers_is_refused():
    model, _, trained = student_of()
    with pytest.raises(ValueError, match="does not say what the source's layers were"):
        shared_teacher(model, None, set(trained))


# Losses -------------------------------------------------------------------------------------------------------------
def naive(align, batch):
    """Every loss per counted token from two whole forward passes with hooks of its own, on full logits."""
    model, teacher, found = align.student, align.teacher, {}
    mixers = {"student": [], "teacher": []}

    def listen(key):
        return lambda module, arguments, output: mixers[key].append((arguments[0], output[0]))

    handles = [layer.self_attn.register_forward_hook(listen("student")) for layer in model.model.layers]
    handles += [layer.self_attn.register_forward_hook(listen("teacher")) for layer in teacher.model.layers]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    student_out = model(**inputs, use_cache=False, output_hidden_states=True)
    with torch.no_grad():
        teacher_out = teacher(**inputs, use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    counted = torch.zeros_like(batch["labels"], dtype=torch.bool)
    counted[:, :-1] = batch["labels"][:, 1:] != IGNORED

    def relative(ours, theirs):
        rows = [
            mask.sum() * (a - b)[mask].square().sum() / b[mask].square().sum()
            for a, b, mask in zip(ours, theirs, counted)
        ]
        return sum(rows) / counted.sum()

    final = [model.model(**inputs, use_cache=False)[0], teacher.model(**inputs, use_cache=False)[0].detach()]
    found["hidden"] = relative(*final)
    pairs = list(zip(mixers["student"], mixers["teacher"]))
    found["student"] = sum(relative(ours[1], theirs[1]) for ours, theirs in pairs) / len(pairs)
    apart = 0
    for layer, (_, (given, theirs)) in zip(model.model.layers, pairs):
        rotary = model.model.rotary_emb(given, batch["position_ids"])
        rows = Rows(layout=None, lengths=[None], rotary=[rotary], columns=None)
        y, innovation = layer.fading(given, rows)
        apart = apart + relative(layer.self_attn(given, rows, y, innovation)[0], theirs) / len(pairs)
    found["teacher"] = apart
    p, q = teacher_out.logits[counted].log_softmax(-1), student_out.logits[counted].log_softmax(-1)
    found["kl"] = (p.exp() * (p - q)).sum() / counted.sum()
    labels = batch["labels"][:, 1:][counted[:, :-1]]
    found["ce"] = torch.nn.functional.cross_entropy(student_out.logits[counted], labels)
    return found


@pytest.mark.parametrize("name", ["llama", "smollm3"])
def test_losses_and_gradients_equal_the_formulas_on_whole_models(name):
    batch, weights = batch_of(), {"hidden": 0.5, "mixer": 2.0, "kl": 1.5, "ce": 0.25}
    for mixer_inputs in ("teacher", "student"):
        align = alignment({**weights, "mixer_inputs": mixer_inputs, "logit_chunk": 7}, name)
        out = align(**batch)
        expected = naive(align, batch)
        expected["mixer"] = expected[mixer_inputs]
        assert out["parts"].keys() == weights.keys()
        for key, part in out["parts"].items():
            torch.testing.assert_close(part, expected[key].detach(), rtol=1e-9, atol=1e-12)
        total = sum(weight * expected[key] for key, weight in weights.items())
        parameters = [value for value in align.student.parameters() if value.requires_grad]
        ours = torch.autograd.grad(out["loss"], parameters)
        for mine, theirs in zip(ours, torch.autograd.grad(total, parameters)):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-12)
        assert sum(gradient.abs().sum() for gradient in ours) > 0


def test_both_mixer_forms_agree_where_the_layers_input_is_the_same():
    """The first layer reads the embeddings in both."""
    forms = [alignment({"mixer": 1.0, "mixer_inputs": form}) for form in ("teacher", "student")]
    for align in forms:
        align.mixers = [0]
    batch = batch_of()
    torch.testing.assert_close(forms[0](**batch)["loss"], forms[1](**batch)["loss"], rtol=1e-12, atol=0)


def test_a_fresh_graft_inside_its_window_has_nothing_to_learn():
    align = alignment({"hidden": 1.0, "mixer": 1.0, "kl": 1.0})
    out = align(**batch_of(tokens=W, first=0))
    assert all(abs(value.item()) < 1e-14 for value in out["parts"].values())
    assert align(**batch_of())["loss"] > 1e-4


def test_mixers_alone_run_no_student_pass():
    """What makes this loss cheap: the student's embeddings, MLPs and head are never called."""
    align = alignment({"mixer": 1.0})
    called = []
    for name, module in align.student.named_modules():
        module.register_forward_hook(lambda module, *_, name=name: called.append(name))
    align(**batch_of())["loss"].backward()
    # The table of rotations is the teacher's too.
    assert all(".self_attn" in name or ".fading" in name for name in set(called) - {"model.rotary_emb"})
    assert sum(name.endswith("self_attn") for name in called) == 2
    assert all(value.grad is not None for value in align.student.parameters() if value.requires_grad)


WHOLE = {"hidden": 1.0, "mixer": 1.0, "kl": 1.0, "ce": 1.0}


@pytest.mark.parametrize("form", ["teacher", "student"])
def test_losses_do_not_depend_on_padding(form):
    align = alignment({**WHOLE, "mixer_inputs": form})
    batch = batch_of()
    plain, longer = align(**batch), align(**padded(batch, 5))
    for name in plain["parts"]:
        torch.testing.assert_close(longer["parts"][name], plain["parts"][name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("form", ["teacher", "student"])
def test_micro_batches_add_up(form):
    """With num_items_in_batch, as under gradient accumulation or on several devices."""
    align = alignment({**WHOLE, "mixer_inputs": form})
    batch = batch_of(rows=3)
    batch["labels"][1, : 2 * W] = IGNORED
    whole = align(**batch)
    count = (batch["labels"][:, 1:] != IGNORED).sum()
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    parts = [align(**row, num_items_in_batch=count) for row in rows]
    torch.testing.assert_close(sum(part["loss"] for part in parts), whole["loss"], rtol=1e-9, atol=0)
    # Also when the Trainer hands the count over with a dimension, and when nothing counts.
    assert torch.equal(align(**batch, num_items_in_batch=count[None])["loss"], whole["loss"])
    batch["labels"].fill_(IGNORED)
    assert align(**batch)["loss"] == 0


@pytest.mark.parametrize("form", ["teacher", "student"])
def test_packed_documents_are_those_documents_alone(form):
    align = alignment({**WHOLE, "mixer_inputs": form})
    alone = [batch_of(rows=1, tokens=tokens, first=0) for tokens in (W + 7, 2 * W + 5, 6)]
    alone[1]["input_ids"] = (alone[1]["input_ids"] + 1) % VOCAB
    alone[1]["labels"][:, 1:] = alone[1]["input_ids"][:, 1:]
    packed = padded({key: torch.cat([part[key] for part in alone], 1) for key in alone[0]}, 3)
    losses = {key: sum(align(**part, num_items_in_batch=1)["parts"][key] for part in alone) for key in ("kl", "ce")}
    found = align(**packed, num_items_in_batch=1)["parts"]
    for key, expected in losses.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("losses", [{"mixer": 1.0}, {**WHOLE, "mixer_inputs": "student"}])
def test_gradient_checkpointing_changes_nothing(losses):
    gradients = []
    for on in (False, True):
        align = alignment(losses)
        if on:
            align.activation_checkpointing_enable({"use_reentrant": False})
        align(**batch_of())["loss"].backward()
        gradients.append([value.grad for value in align.student.parameters() if value.requires_grad])
    for plain, saved in zip(*gradients):
        assert torch.equal(plain, saved)


def test_mixed_precision_keeps_trained_tensors_in_float32():
    folder = tiny_graft()
    model = BMojoForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    trained = choose_trained(model, "new", read_report(folder))
    teacher = shared_teacher(model, read_report(folder)["source"], set(trained))
    hold_in_float32(model)
    align = Alignment(model, teacher, LossSettings(**WHOLE)).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = align(**batch_of())
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32 and out["loss"].isfinite()
    values = dict(model.named_parameters())
    assert {values[name].dtype for name in trained} == {torch.float32}
    assert {value.dtype for name, value in values.items() if name not in trained} == {torch.bfloat16}
    assert sum(values[name].grad.abs().sum() for name in trained) > 0


# A teacher of its own -------------------------------------------------------------------------------------------------
def test_the_source_as_a_teacher_of_its_own_gives_the_same_losses():
    """transformers' own Llama, on rows that are padded and hold several documents."""
    align = alignment({"hidden": 1.0, "kl": 1.0})
    teacher, tokenizer = load_teacher(str(tiny_graft().parent / "source"), torch.float32)
    assert isinstance(teacher, LlamaForCausalLM) and tokenizer is not None
    other = Alignment(align.student, teacher.double(), align.losses).train()
    lengths = (W + 7, 2 * W + 5, 6)
    packed = padded({key: torch.cat([batch_of(1, n, 0)[key] for n in lengths], 1) for key in batch_of()}, 3)
    for batch in (batch_of(), padded(batch_of(), 4), packed):
        ours, theirs = align(**batch), other(**batch)
        torch.testing.assert_close(theirs["loss"], ours["loss"], rtol=1e-5, atol=0)


def test_document_groups():
    positions = torch.tensor([[0, 1, 0, 0, 1], [0, 1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    groups = [[[2], [8]], [[0, 1, -1], [3, 4, -1], [5, 6, 7]]]
    assert [index.tolist() for index in document_groups(positions, mask)] == groups


def test_a_long_document_does_not_pad_the_short_ones():
    """A teacher of another class computes at most twice the tokens, however lengths differ within a row."""
    teacher, _ = load_teacher(str(tiny_graft().parent / "source"), torch.float32)
    lengths = (60, 1, 2, 3, 1, 5, 40, 4, 9, 2, 1)
    batch = {key: torch.cat([batch_of(1, n, 0)[key] for n in lengths], 1) for key in ("input_ids", "position_ids")}
    computed = []
    teacher.model.register_forward_pre_hook(
        lambda module, arguments, options: computed.append(options["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        found = run_teacher(teacher, {**batch, "attention_mask": None})
        assert sum(lengths) <= sum(computed) < 2 * sum(lengths)
        start = 0
        for length in lengths:
            alone = teacher.model(input_ids=batch["input_ids"][:, start : start + length]).last_hidden_state
            torch.testing.assert_close(found[:, start : start + length], alone, rtol=1e-5, atol=1e-5)
            start += length


def test_unfit_teachers_are_refused():
    model, *_ = student_of()
    source, tokenizer = load_teacher(str(tiny_graft().parent / "source"), torch.float32)
    small = copy.deepcopy(SOURCES["llama"])
    small.vocab_size = VOCAB - 1
    with pytest.raises(ValueError, match="vocabulary has 95 tokens, the student's 96"):
        check_teacher(model, tokenizer, AutoModelForCausalLM.from_config(small), None, LossSettings(kl=1))
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match="tokenizer's vocabulary differs"):
        check_teacher(model, tokenizer, source, other, LossSettings(kl=1))
    with pytest.raises(ValueError, match=r"losses\.mixer: compares layer by layer"):
        check_teacher(model, tokenizer, source, tokenizer, LossSettings(mixer=1))
    wide = copy.deepcopy(SOURCES["llama"])
    wide.hidden_size = 40
    with pytest.raises(ValueError, match=r"losses\.hidden: the teacher's hidden size is 40, the student's 32"):
        check_teacher(model, tokenizer, AutoModelForCausalLM.from_config(wide), tokenizer, LossSettings(hidden=1))
    deep = BMojoForCausalLM(BMojoConfig(**{**SIZES, "vocab_size": VOCAB, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="must have the same layers"):
        check_teacher(model, tokenizer, deep, tokenizer, LossSettings(mixer=1))
    check_teacher(model, tokenizer, source, tokenizer, LossSettings(kl=1, hidden=1))
    with pytest.raises(ValueError, match="teacher='nowhere/at-all': does not load"):
        load_teacher("nowhere/at-all", torch.float32)


def test_heads_that_are_not_linear_are_refused_and_scaled_ones_are_known():
    scaled = GraniteForCausalLM(
        GraniteConfig(**SOURCES["llama"].to_dict() | {"model_type": "granite"}, logits_scaling=4.0)
    )
    check_head(scaled, "teacher")
    model, *_ = student_of()
    check_head(model, "source")
    model.lm_head.register_forward_hook(lambda module, arguments, output: output.tanh())
    with pytest.raises(ValueError, match="source: its logits are more than a linear map"):
        check_head(model, "source")


def test_run_teacher_gives_hidden_states_in_place():
    align = alignment({"kl": 1.0})
    batch = padded(batch_of(), 2)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}
    hidden = run_teacher(align.teacher, inputs)
    assert hidden.shape == (2, T + 2, 32)
