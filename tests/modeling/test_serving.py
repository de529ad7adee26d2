"""`transformers serve` and `chat` on exported folders, by the folders' own code: they say what generate() says."""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import torch

from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.conversion.graft_sources import tiny_tokenizer
from tests.oracles import randomize_
from tests.strangers import NO_PACKAGE, strange_environment
from tests.tiny import MIXED_LAYERS, SIZES


TOKENIZER = tiny_tokenizer()
WORDS = dict(vocab_size=len(TOKENIZER), bos_token_id=1, eos_token_id=2, pad_token_id=0)
FOLDERS = {"plain": {}, "mixed": MIXED_LAYERS, "storage": {"storage_size": 8, "max_rope_distance": 64}}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
TRANSFORMERS = NO_PACKAGE + "from transformers.cli.transformers import main\nsys.argv[0] = 'transformers'\nmain()"
DOCUMENT = "a b c d e f g h i j j i h g f e d c b a c e g i"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Exported models by name, in float64, so that no rounding decides between two words."""
    root = tmp_path_factory.mktemp("served")
    for name, fields in FOLDERS.items():
        torch.manual_seed(3)
        model = randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **WORDS, **fields}))).double()
        model.save_pretrained(root / name)
        TOKENIZER.save_pretrained(root / name)
    return {name: root / name for name in FOLDERS}


@contextlib.contextmanager
def serving(work: Path, *arguments: object, **environment: str):
    """The address of a `transformers serve` in a process that has no package of ours."""
    command = [sys.executable, "-c", TRANSFORMERS, "serve", "--trust-remote-code", "--device", "cpu", "--port", "0"]
    log = work / "serve.log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=work,
            env=strange_environment(work, **environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://{_address(server, log)}"
    finally:
        server.kill()
        server.wait()


def _address(server: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < end:
        if found := re.search(r"running on http://(\S+:\d+)", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def address(folders, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as address:
        yield address


def ask(address, folder, chat, **options):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
    return client.chat.completions.create(
        model=str(folder), messages=chat, max_tokens=GREEDY["max_new_tokens"], temperature=0, **options
    )


def streamed(address, folder, chat):
    """The parts of an answer, in the order they come."""
    parts = [chunk.choices[0].delta.content for chunk in ask(address, folder, chat, stream=True)]
    return [part for part in parts if part]


def told(folder, chat, cls=BMojoForCausalLM, **options):
    """What generate() says, in this process and by the package's code."""
    model = cls.from_pretrained(folder).eval()
    assert model.dtype == torch.float64
    inputs = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, **{**GREEDY, **options})
    return TOKENIZER.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("name", FOLDERS)
def test_several_turns_are_answered_with_the_text_of_generate(name, address, folders):
    chat = []
    for question in (f"{DOCUMENT} b", "f a", "c"):
        chat.append(user(question))
        expected = told(folders[name], chat, use_cache=False)
        parts = streamed(address, folders[name], chat)
        assert "".join(parts) == expected and [part.strip() for part in parts] == expected.split()
        whole = ask(address, folders[name], chat)
        assert whole.choices[0].message.content == expected
        asked = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert whole.usage.prompt_tokens == len(asked) and whole.usage.completion_tokens <= 8
        chat.append({"role": "assistant", "content": expected})


def test_chat_in_a_terminal(address, folders, tmp_path):
    said = [user("a b c d e f g h"), {"role": "assistant"}, user("i c")]
    said[1]["content"] = told(folders["plain"], said[:1])
    expected = [said[1]["content"], told(folders["plain"], said)]
    command = [sys.executable, "-c", TRANSFORMERS, "chat", folders["plain"], address, "--user", "me"]
    flags = ["do_sample=False", f"max_new_tokens={GREEDY['max_new_tokens']}"]
    # "n": after an answer of all the tokens that it may have, it asks whether to go on.
    typed = f"{said[0]['content']}\nn\n{said[2]['content']}\nn\n!exit\n"
    # Offline, huggingface_hub's client asks no server at all, not even this machine's.
    chat = subprocess.run(
        [*map(str, command), *flags],
        input=typed,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env=strange_environment(tmp_path, COLUMNS="200", HF_HUB_OFFLINE="0"),
    )
    assert chat.returncode == 0, chat.stderr[-3000:]
    lines = [line.strip() for line in chat.stdout.splitlines()]
    assert [line for line in lines if line in expected] == expected


def lengths(memory):
    return sorted(int(path.name.split("-")[1]) for path in memory.glob("prefix-*"))


def test_a_document_is_read_once_and_by_one_model(folders, tmp_path):
    """Its snapshot is what answers: with another text's in its place, the answer is to that text."""
    folder, memory = folders["plain"], tmp_path / "prefixes"
    chats = [[user(f"{DOCUMENT} {question}")] for question in ("b", "j h b", "c c d")]
    plain = [told(folder, chat) for chat in chats]
    other = [user(chats[2][0]["content"].replace("a b c d", "d d a f"))]
    answer_to_other = told(folder, other)
    settings = dict(BMOJO_PREFIX_MEMORY=str(memory), BMOJO_PREFIX_KEEP="8", BMOJO_PREFIX_MAX_BYTES="10000000")
    with serving(tmp_path, **settings) as address:
        assert "".join(streamed(address, folder, chats[0])) == plain[0]
        first = lengths(memory)
        assert first[:3] == [8, 16, 24] and len(first) == 4
        assert "".join(streamed(address, folder, chats[1])) == plain[1]
        assert lengths(memory)[:4] == first and len(lengths(memory)) == 5

        ids = TOKENIZER.apply_chat_template(other, return_tensors="pt")["input_ids"][:, :24]
        BMojoForCausalLM.from_pretrained(folder).eval().prefix_memory(tmp_path / "other").read(ids)
        (known,), (strange,) = memory.glob("prefix-24-*"), (tmp_path / "other").glob("prefix-24-*")
        shutil.copy(strange, known)
        assert ask(address, folder, chats[2]).choices[0].message.content == answer_to_other != plain[2]

        before = lengths(memory)
        with pytest.raises(openai.APIError) as refused:
            streamed(address, folders["mixed"], [user("a b")])
        assert "what it holds was read with" in str(refused.value.body) and lengths(memory) == before
        assert ask(address, folder, chats[1]).choices[0].message.content == plain[1]  # and goes on
