"""Finding a base: folders, hub ids, and what is refused before any weight is read."""

import json
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import tiny_base

from lora_cli.errors import ModelError, SafetyError
from lora_cli.models.base import read_config, resolve_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def base(tmp_path):
    return tiny_base(tmp_path / "base")


def change_config(folder, **changed) -> None:
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | changed))


def test_a_folder_is_taken_as_it_is(base):
    found = resolve_base(str(base))

    assert (found.name, found.folder, found.revision) == (str(base), base, None)


@pytest.mark.parametrize("key", ["vision_config", "audio_config"])
def test_a_vision_language_base_is_refused_with_a_sentence(base, key):
    change_config(base, **{key: {}})

    with pytest.raises(ModelError, match="is a vision-language or audio model, and `lora` trains text models") as error:
        resolve_base(str(base))
    assert error.value.code == 4


def test_own_code_is_ignored_with_a_notice_where_transformers_has_the_architecture(base, caplog):
    change_config(base, auto_map={"AutoModelForCausalLM": "evil--modeling.Llama"})

    with caplog.at_level(logging.WARNING, "lora_cli"):
        found = resolve_base(str(base))

    assert found.folder == base
    assert [r.getMessage() for r in caplog.records] == [
        f"{base} brings its own code (`auto_map`): ignored, transformers' own `llama` is used"
    ]


def test_own_code_of_an_unknown_architecture_is_refused(base):
    change_config(base, auto_map={"AutoModelForCausalLM": "modeling.New"}, model_type="brand_new")

    with pytest.raises(
        SafetyError, match=r"brings its own code \(`auto_map`\), and transformers has no `brand_new` itself"
    ) as error:
        resolve_base(str(base))
    assert error.value.code == 9


@pytest.mark.parametrize("key", ["custom_code", "trust_remote_code", "_attn_implementation_internal"])
def test_a_config_that_asks_for_code_from_elsewhere_is_refused(base, key):
    change_config(base, **{key: "someone/kernels"})

    with pytest.raises(SafetyError, match=f"it asks for code from elsewhere: `{key}`"):
        resolve_base(str(base))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no/such/model", "a/b/c", "missing.gguf"])
def test_what_is_neither_folder_nor_file_nor_hub_id_is_told(name):
    with pytest.raises(ModelError, match="no model folder, GGUF file or hub id") as error:
        resolve_base(name)
    assert "Qwen/Qwen3-0.6B" in error.value.problems[0].fix


def test_a_file_that_is_no_gguf_is_told(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")

    with pytest.raises(ModelError, match="no model folder, GGUF file or hub id"):
        resolve_base(str(tmp_path / "model.bin"))


def test_a_hub_id_that_is_not_in_the_cache_is_told_with_its_page_when_offline():
    with pytest.raises(ModelError) as error:
        resolve_base("someone/some-model")

    problem = error.value.problems[0]
    assert (
        problem.what
        == "someone/some-model is neither a folder here nor in the hub's cache, and the hub can't be reached"
    )
    assert problem.where == "https://huggingface.co/someone/some-model"


def test_an_adapter_given_as_a_base_is_recognised(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(ModelError, match=r"no config\.json") as error:
        resolve_base(str(tmp_path))
    assert error.value.problems[0].fix == "an adapter is given with `--adapter`"


@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_a_config_that_is_no_json_object_is_told(base, text):
    (base / "config.json").write_text(text)

    with pytest.raises(ModelError, match="it is no JSON"):
        read_config(base)


class Hub(BaseHTTPRequestHandler):
    """The hub's answers, by the owner in the address."""

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def _answer(self):
        if self.path.startswith("/api/models/gated-files/"):  # the page is public, its files are not
            file = {"type": "file", "path": "config.json", "size": 3, "oid": "0" * 40}
            info = {"id": "gated-files/model", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
            self._send(200, [file] if "/tree/" in self.path else info)
        elif "/gated" in self.path:
            self._send(401, {"error": "restricted"}, "GatedRepo")
        elif "/no-revision/" in self.path:
            self._send(404, {"error": "no such revision"}, "RevisionNotFound")
        elif "/broken/" in self.path:
            self._send(500, {"error": "down"})
        else:
            self._send(401, {"error": "no such repository"}, "RepoNotFound")

    def _send(self, status: int, body: object, code: str | None = None):
        content = json.dumps(body).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# One process asks for all, because its imports cost more than the answers
ASK = """
import json, sys
from lora_cli.errors import UserError
from lora_cli.models.base import resolve_base

def ask(name):
    try:
        resolve_base(name, "v9" if "no-revision" in name else None)
    except UserError as error:
        return [error.code, error.problems[0].what, error.problems[0].where, error.problems[0].fix]

print(json.dumps({name: ask(name) for name in sys.argv[1:]}))
"""
NAMES = ("gated/model", "gated-files/model", "no-revision/model", "nobody/model", "broken/model")


@pytest.fixture(scope="module")
def answers(hub, tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")} | {
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, *NAMES], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["gated/model", "gated-files/model"])
def test_a_gated_base_without_a_token_is_told_with_its_licence_page(answers, name):
    page = f"https://huggingface.co/{name}"

    assert answers[name] == [
        4,
        f"{name} is gated, and no token with access to it was given",
        page,
        f"accept its licence at {page}, then run `hf auth login` or set HF_TOKEN",
    ]


def test_a_revision_that_is_not_there_is_told(answers):
    assert answers["no-revision/model"][:2] == [4, "no-revision/model has no revision 'v9'"]


def test_a_model_that_is_not_there_is_told(answers):
    assert answers["nobody/model"][:2] == [4, "the hub has no model nobody/model, or it is private"]


def test_a_hub_that_is_down_is_told(answers):
    assert answers["broken/model"][0] == 4
    assert "the hub can't be reached" in answers["broken/model"][1]
