"""`hificl serve` as a process of its own, asked by OpenAI's client and by curl."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image

from pipeline import adapters, backbones
from pipeline.core.errors import InputError
from tests.conftest import ROOT
from tests.support.serving import ADMIN, BACKBONE, TOKEN, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

METHODS = {"pets": "hificl", "signs": "mimic", "live": "live", "lora": "lora", "captions": "hificl"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Adapters far from where they start, in folders as trials leave them."""
    root, loaded = (
        tmp_path_factory.mktemp("adapters"),
        backbones.load(BACKBONE, weights=ROOT / "checkpoints" / BACKBONE),
    )
    made = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        adapter, generator = adapters.create(method, loaded.model, seed=seed), torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
        task = "mini-coco" if name == "captions" else "mini-vqa"
        origin = {"backbone": BACKBONE, "task": task, "precision": "fp32", "backbone_digest": loaded.digest}
        adapter.save_pretrained(root / name, origin)
        made[name] = root / name
    return made


@pytest.fixture(scope="module")
def expected(folders, pictures):
    """`expected(name, picture, question, most)` is what `hificl predict` answers."""
    from pipeline.evaluate.answerer import Answerer

    answerers = {name: Answerer(folder, project=ROOT) for name, folder in folders.items()}
    return lambda name, picture, question, most=None: answerers[name].answer(picture, question, most)["answer"]


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    words = [word for name in METHODS if name != "live" for word in ("--adapter", f"{name}={folders[name]}")]
    words += ["--rows", "6", "--adapters-under", str(folders["pets"].parent)]
    home = tmp_path_factory.mktemp("home")
    running = Server(words, home, HIFICL_SERVE_TOKEN=TOKEN, HIFICL_SERVE_ADMIN_TOKEN=ADMIN)
    yield running
    assert running.end() == 0
    assert running.process.stdout.read() == ""


def asked(picture: Path | None, question: str | None):
    content = [{"type": "text", "text": question}] if question else []
    if picture:
        url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]


def test_mixed_requests_at_once_get_what_predict_answers(server, expected, pictures):
    client = server.client()
    cases = [
        (name, pictures / f"{i % 7}.png", None if name == "captions" else f"Which {('shape', 'colour')[i % 2]}?", i % 3)
        for i in range(5) for name in ("pets", "signs", "lora", "captions")
    ]  # fmt: skip

    def ask(case):
        name, picture, question, kind = case
        given = {"model": name, "messages": asked(picture, question)}
        if kind == 0:
            whole = client.chat.completions.create(**given)
            assert whole.model == name and whole.usage.prompt_tokens > 5
            assert whole.choices[0].finish_reason in ("stop", "length")
            return whole.choices[0].message.content
        text, ends, usage = "", [], None
        for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": kind == 2}):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                ends += [choice.finish_reason] if choice.finish_reason else []
            usage = chunk.usage or usage
        assert ends in (["stop"], ["length"]) and (usage is not None) == (kind == 2)
        return text

    with ThreadPoolExecutor(len(cases)) as threads:
        answers = list(threads.map(ask, cases))
    assert answers == [expected(*case[:3]) for case in cases]
    assert len(set(answers)) > 5
    most = client.chat.completions.create(model="captions", messages=asked(pictures / "0.png", None), max_tokens=2)
    assert most.choices[0].message.content == expected("captions", pictures / "0.png", None, 2)
    assert most.usage.completion_tokens <= 2


def test_what_is_served_and_counted_is_told(server):
    assert {model.id for model in server.client().models.list()} >= {"pets", "signs", "lora", "captions"}
    assert server.client().models.retrieve("pets").owned_by == BACKBONE
    status, metrics = server.call("/metrics", token=TOKEN)
    assert status == 200 and re.search(r'hificl_requests_total\{end="\w+",model="pets"\} [1-9]', metrics)
    assert json.loads(server.call("/health")[1])["status"] == "ok"


def test_without_the_token_nothing_is_told(server, pictures):
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client("another-token").chat.completions.create(
            model="pets", messages=asked(pictures / "0.png", "What?")
        )
    assert caught.value.code == "invalid_api_key"
    routes = [("/v1/models", "GET"), ("/v1/models/pets", "GET"), ("/metrics", "GET"), ("/v1/chat/completions", "POST"),
              ("/admin/adapters", "POST"), ("/admin/adapters/pets", "DELETE")]  # fmt: skip
    for path, method in routes:
        for token in ("", "wrong", TOKEN if path.startswith("/admin") else ADMIN, TOKEN[:-1], "ä"):
            assert server.call(path, token=token.encode().decode("latin-1"), method=method)[0] == 401, (path, token)
    for path in ("/docs", "/openapi.json", "/redoc"):  # routes that FastAPI adds by itself
        assert server.call(path)[0] == 404
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    "url", ["/etc/hostname", "file:///etc/hostname", "http://127.0.0.1:9/x.png", "data:image/png,abc", "photo.png", ""]
)
def test_a_picture_is_a_data_url_alone(server, url):
    content = [{"type": "text", "text": "Which shape?"}, {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError, match=r"data: URL .* nothing is fetched or opened"):
        server.client().chat.completions.create(model="pets", messages=[{"role": "user", "content": content}])


def test_what_is_too_large_is_refused(server, tmp_path):
    status, body = server.call("/v1/chat/completions", data=b" " * (33 << 20), token=TOKEN)
    assert status == 413 and json.loads(body)["error"]["message"] == "more than 32 MiB"
    Image.new("1", (11_000, 10_001)).save(tmp_path / "bomb.png")
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (tmp_path / "text.png").write_bytes(b"hello")
    for name, says in (
        ("bomb", "more pixels than the limit"),
        ("program", "no image of a known"),
        ("text", "no image"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            server.client().chat.completions.create(model="pets", messages=asked(tmp_path / f"{name}.png", "Which?"))


def test_what_is_not_offered_is_refused_by_name_in_openais_form(server, pictures):
    create, good = server.client().chat.completions.create, asked(pictures / "0.png", "Which shape?")
    system = {"role": "system", "content": "Be brief."}
    for given, says, param in (
        ({"temperature": 0.7}, "temperature", "temperature"),
        ({"n": 2}, "n: ", "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unknown field 'tools'", "tools"),
        ({"max_tokens": 100_000}, "max_tokens", "max_tokens"),
        ({"messages": [system, *good]}, "one message of the user", "messages"),
        ({"messages": asked(pictures / "0.png", None)}, "task mini-vqa needs a question", None),
        ({"messages": asked(None, "Which shape?")}, "task mini-vqa needs an image", None),
        (
            {"messages": [{"role": "user", "content": good[0]["content"] * 2}]},
            "2 pictures, where one is taken",
            "messages",
        ),
        ({"model": "captions"}, "task mini-coco has no question", None),
        ({"stop": ["x" * 101]}, "4 texts of 100 characters", "stop"),
        ({"stop": list("abcde")}, "4 texts", "stop"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create(**{"model": "pets", "messages": good, **given})
        assert says in caught.value.message and caught.value.param == param
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="no adapter 'pet' is served. Did you mean 'pets'"):
        create(model="pet", messages=good)
    assert create(model="pets", messages=good, temperature=0, seed=1, user="me").choices[0].message.content is not None
    for body in (b"", b"{", b"[" * 100_000, b"[]", b'"\xff"'):
        status, text = server.call("/v1/chat/completions", data=body, token=TOKEN)
        assert status == 400 and set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    assert json.loads(server.call("/v1/completions")[1])["error"]["message"] == "Not Found"


def test_adapters_come_and_go_on_request(server, folders, expected, pictures, tmp_path):
    messages, client = asked(pictures / "1.png", "Which shape?"), server.client()
    assert server.call("/admin/adapters", {"name": "new", "folder": "live"})[0] == 200
    answer = client.chat.completions.create(model="new", messages=messages)
    assert answer.choices[0].message.content == expected("live", pictures / "1.png", "Which shape?")
    outside = folders["pets"].parent / "outside"
    outside.symlink_to(ROOT)
    for folder, says in (
        ("../../..", "not below"), (str(tmp_path), "not below"), ("outside", "not below"), ("nowhere", "no such file"),
    ):  # fmt: skip
        status, body = server.call("/admin/adapters", {"name": "other", "folder": folder})
        assert status == 400 and says in json.loads(body)["error"]["message"]
    for name, says in (("new", "is served"), ("a/b", "is no name"), ("", "is no name")):
        status, body = server.call("/admin/adapters", {"name": name, "folder": "live"})
        assert status == 400 and says in json.loads(body)["error"]["message"]
    assert server.call("/admin/adapters/new", method="DELETE")[0] == 200
    assert server.call("/admin/adapters/new", method="DELETE")[0] == 404
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="new", messages=messages)


def test_it_ends_when_it_is_told_to_and_answers_what_is_under_way(folders, expected, pictures, tmp_path):
    """With tokens of its own, made at the start; the page's commands and its script are run on the way."""
    words = ["--adapter", f"pets={folders['pets']}", "--adapter", f"captions={folders['captions']}"]
    own = Server([*words, "--adapters-under", "/", "--rows", "1", "--waiting", "12"], tmp_path)
    kept = tmp_path / ".hificl/serve"
    tokens = {name: (kept / name).read_text() for name in ("token", "admin-token")}
    _as_the_page_says(own, tmp_path, folders, pictures, expected)

    client, begun = own.client(tokens["token"]), threading.Barrier(13)

    def listen(number):
        given = {"model": "captions", "messages": asked(pictures / f"{number % 7}.png", None), "max_tokens": 300}
        chunks = client.chat.completions.create(**given, stream=True)
        heard = [next(chunks)]  # the server has taken the question
        begun.wait(60)
        heard += chunks
        assert heard[-1].choices[0].finish_reason in ("stop", "length")
        return "".join(chunk.choices[0].delta.content or "" for chunk in heard)

    with ThreadPoolExecutor(12) as threads:
        answers = threads.map(listen, range(12))
        begun.wait(60)
        body = {"model": "captions", "messages": asked(pictures / "0.png", None), "max_tokens": 300, "stream": True}
        headers = {"Authorization": f"Bearer {tokens['token']}", "Content-Type": "application/json"}
        more = urllib.request.Request(f"{own.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with contextlib.ExitStack() as streams, pytest.raises(urllib.error.HTTPError) as refused:
            for _ in range(20):  # one is answered, and twelve wait at most
                streams.enter_context(urllib.request.urlopen(more, timeout=60))
        assert refused.value.code == 429 and refused.value.headers["Retry-After"] == "1"
        assert json.loads(refused.value.read())["error"]["code"] == "rate_limit_exceeded"
        assert own.end() == 0
        assert list(answers) == [expected("captions", pictures / f"{i % 7}.png", None, 300) for i in range(12)]
    log = "".join(own.lines) + own.process.stdout.read()
    assert str(kept / "token") in log and not any(token in log for token in tokens.values())


def _as_the_page_says(server, home, folders, pictures, expected):
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8").replace("http://127.0.0.1:8000", server.url)
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (home / "photo.png").write_bytes((pictures / "2.png").read_bytes())
    options = {"cwd": home, "env": {**os.environ, "HOME": str(home)}, "text": True, "capture_output": True}
    done = subprocess.run([sys.executable, "-c", script], **options, check=False)
    assert done.stdout.strip() == expected("pets", pictures / "2.png", "Which shape?"), done.stderr
    commands = re.findall(r"^curl .*$", page, re.MULTILINE)
    assert len(commands) == 4
    said = []
    for command in commands:
        filled = command.replace("runs/KEY/adapter", str(folders["live"]))
        said.append(subprocess.run(["bash", "-c", filled], **options, check=True).stdout)
    loaded, gone, metrics, health = said
    assert json.loads(loaded)["id"] == json.loads(gone)["id"] == "more" and json.loads(gone)["deleted"]
    assert "hificl_requests_total" in metrics and json.loads(health)["backbone"] == BACKBONE


def test_tokens_are_made_once_for_their_owner_alone(tmp_path, monkeypatch):
    from pipeline.serve import Secrets

    for name in ("HIFICL_SERVE_TOKEN", "HIFICL_SERVE_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    made = Secrets.found(tmp_path / "serve")
    files = [tmp_path / "serve" / name for name in ("token", "admin-token")]
    assert [file.read_text() for file in files] == [made.token, made.admin] and made.token != made.admin
    assert len(made.token) > 40 and made.token not in made.says and made.admin not in made.says
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "serve").stat().st_mode) == 0o700
    files[0].chmod(0o644)
    assert Secrets.found(tmp_path / "serve") == made and stat.S_IMODE(files[0].stat().st_mode) == 0o600
    monkeypatch.setenv("HIFICL_SERVE_TOKEN", "short")
    with pytest.raises(InputError, match="HIFICL_SERVE_TOKEN: has fewer than 16 characters"):
        Secrets.found(tmp_path / "serve")
    monkeypatch.setenv("HIFICL_SERVE_TOKEN", made.admin)
    with pytest.raises(InputError, match="is also the token for questions"):
        Secrets.found(tmp_path / "serve")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_reach_it_only_where_that_is_said(host, tmp_path):
    from pipeline.serve import is_loopback, serve

    given = {"port": 0, "secrets_in": tmp_path, "root": tmp_path, "most_rows": 1, "most_waiting": 1}
    with pytest.raises(InputError, match="other machines would reach the server. Give --expose"):
        serve(BACKBONE, {}, host=host, exposed=False, **given)
    assert list(tmp_path.iterdir()) == []  # nothing was begun
    assert all(is_loopback(own) for own in ("127.0.0.1", "127.8.9.1", "::1", "localhost"))


def test_what_cannot_be_served_is_said_before_weights_are_read(folders, tmp_path, capsys):
    from pipeline.cli import main

    def said(*words):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--tokens-in", str(tmp_path), "--port", "0", *words])
        assert ended.value.code == 2
        return capsys.readouterr().err

    pets = f"pets={folders['pets']}"
    assert "is no NAME=DIR" in said("--backbone", BACKBONE, "--adapter", "pets")
    assert "this name stands twice" in said("--backbone", BACKBONE, "--adapter", pets, "--adapter", pets)
    assert "no such file" in said("--backbone", BACKBONE, "--adapter", f"pets={tmp_path}")
    assert "is below 1" in said("--backbone", BACKBONE, "--rows", "0")
    assert "other machines" in said("--backbone", BACKBONE, "--host", "0.0.0.0")
