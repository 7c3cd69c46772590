"""What is exported is read by timm and torchvision, with the same representations."""

import json
import sys
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
import torchvision
from safetensors.torch import load_file

from sharding.manifest import ShardSet
from train.config import load_config
from train.engine import checkpoint
from train.evaluate.__main__ import main as evaluate
from train.export import _evaluation, main
from train.methods import build_method
from train.processes.distributed import World


def trained(run: Path, *overrides: str) -> Path:
    """A run of a method whose encoder is not as it was initialised, BatchNorm's statistics included."""
    config = load_config(None, ["views.size=64", "views.kernel=5", *overrides])
    torch.manual_seed(1)
    method = build_method(config.method, config.encoder, World())
    encoder = method.exported().train()
    with torch.no_grad():
        for _ in range(2):
            encoder(torch.randn(4, 3, 64, 64) * 2 + 1)
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    plain = {"step": 7, "config": config.model_dump(mode="json"), "identity": {"data": "abc"}, "optimizer": {}}
    checkpoint.save(run, 7, {**plain, "method": method.state_dict()})
    return run


def same(model: Any, run: Path, size: int = 64) -> None:
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), checkpoint.load_encoder(run)(images), rtol=1e-5, atol=1e-5)


def exported(run: Path, out: Path) -> dict[str, Any]:
    assert main(["--checkpoint", str(run), "--out", str(out)]) == 0
    content: dict[str, Any] = json.loads((out / "config.json").read_text())
    return content


def test_a_resnet_is_read_by_timm_and_torchvision(tmp_path: Path) -> None:
    import timm

    run = trained(tmp_path / "run", "encoder=resnet50", "method=byol", "views.interpolation=bicubic")
    config = exported(run, tmp_path / "out")
    same(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), run)
    theirs = torchvision.models.resnet50()
    missing, unexpected = theirs.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    theirs.fc = torch.nn.Identity()
    same(theirs, run)
    scaling = config["pretrained_cfg"]
    assert (scaling["input_size"], scaling["interpolation"], scaling["mean"]) == (
        [3, 64, 64],
        "bicubic",
        [0.485, 0.456, 0.406],
    )
    assert config["parallax"]["data"] == "abc"
    assert config["parallax"]["step"] == 7
    assert config["parallax"]["config"]["method"]["name"] == "byol"
    assert "pretrained by byol" in (tmp_path / "out" / "README.md").read_text()


def test_a_vit_of_any_size_is_read_by_timm(tmp_path: Path) -> None:
    import timm

    run = trained(tmp_path / "run", "encoder=timm:vit_tiny_patch16_224", "encoder.image_size=64")
    exported(run, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    same(model, run)
    same(model, run, size=96)


def test_the_exported_file_is_evaluated_again(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "encoder=resnet18")
    exported(run, tmp_path / "out")
    again = checkpoint.load_pretrained(tmp_path / "out" / "model.safetensors", ["encoder=resnet18"])
    same(again.encoder, run)


def test_the_card_and_the_scaling_are_those_of_the_newest_evaluation(tmp_path: Path, shard_set: ShardSet) -> None:
    run = trained(tmp_path / "run", "encoder=resnet18", "views.size=32", f"data.shards={shard_set.root}")
    assert evaluate(["--checkpoint", str(run), "--protocol", "knn", "knn.k=5"]) == 0
    config = exported(run, tmp_path / "out")
    record = json.loads((run / "evaluation.jsonl").read_text())
    assert config["pretrained_cfg"]["crop_pct"] == pytest.approx(32 / record["view"]["resize"])
    value = record["results"]["pretrained"]["knn"]["k=5 T=0.07 top-1 %"]
    assert f"| knn | k=5 T=0.07 top-1 % | {value:.4g} |" in (tmp_path / "out" / "README.md").read_text()


def test_evaluations_of_other_steps_and_by_transfer_are_not_the_cards(tmp_path: Path, shard_set: ShardSet) -> None:
    run = trained(tmp_path / "run", "encoder=resnet18", "views.size=32", f"data.shards={shard_set.root}")
    assert evaluate(["--checkpoint", str(run), "--protocol", "knn", "knn.k=5"]) == 0
    own = json.loads((run / "evaluation.jsonl").read_text())
    pretrained = checkpoint.load_pretrained(run)._replace(data=own["train"]["fingerprint"])
    transfer = {**own, "train": {**own["train"], "fingerprint": "others"}, "time": "transfer"}
    with (run / "evaluation.jsonl").open("a") as file:
        file.writelines(
            f"{json.dumps(record)}\n" for record in (transfer, {**own, "weights": "earlier", "time": "earlier"})
        )
    assert _evaluation(pretrained) == own
    assert _evaluation(pretrained._replace(data="unknown")) == transfer
    with torch.no_grad():
        next(pretrained.encoder.parameters()).add_(1)
    assert _evaluation(pretrained) is None


def test_a_resnet_that_timm_has_not_is_exported_for_whoever_reads_torchvisions_names(tmp_path: Path) -> None:
    run, out = trained(tmp_path / "run", "encoder=resnet18", "encoder.stem=cifar", "encoder.width=8"), tmp_path / "out"
    config, card = exported(run, out), (out / "README.md").read_text()
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["parallax"]["step"] == 7
    assert "timm" not in card
    (call,) = (line.split() for line in card.splitlines() if line.startswith("    "))
    same(checkpoint.load_pretrained(out / "model.safetensors", call[call.index("--checkpoint") + 2 :]).encoder, run)


def test_the_size_and_crop_are_ours_wherever_timm_looks(tmp_path: Path) -> None:
    import timm
    from timm.data.config import resolve_model_data_config

    run = trained(tmp_path / "run", "encoder=resnet50")
    config = exported(run, tmp_path / "out")["pretrained_cfg"]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    for use_test_size in (False, True):
        found = resolve_model_data_config(model, use_test_size=use_test_size)
        assert (found["input_size"], found["crop_pct"]) == ((3, 64, 64), config["crop_pct"])
    assert not {"paper_ids", "origin_url", "hf_hub_id"} & config.keys()


def test_the_commit_is_that_of_the_training(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "encoder=resnet18")
    assert exported(run, tmp_path / "unknown")["parallax"]["commit"] is None
    (run / "provenance.jsonl").write_text('{"commit": "first"}\n{"commit": "newest"}\n')
    assert exported(run, tmp_path / "out")["parallax"]["commit"] == "newest"
    assert "Parallax at commit newest" in (tmp_path / "out" / "README.md").read_text()


def test_files_in_a_folder_have_cards_of_their_own(tmp_path: Path, shard_set: ShardSet) -> None:
    """Of other people, of whose training nothing is known."""
    for name in ("a", "b"):
        weights = torchvision.models.resnet18().state_dict()
        torch.save(weights, tmp_path / f"{name}.pth")
    settings = ["encoder=resnet18", f"data.shards={shard_set.root}", "views.size=32", "views.kernel=5"]
    assert evaluate(["--checkpoint", str(tmp_path / "a.pth"), "--protocol", "knn", "knn.k=5", *settings]) == 0
    for name in ("a", "b"):
        out = tmp_path / f"out-{name}"
        assert main(["--checkpoint", str(tmp_path / f"{name}.pth"), "--out", str(out), *settings]) == 0
        card, config = (out / "README.md").read_text(), json.loads((out / "config.json").read_text())
        assert f"# resnet18, weights of {name}.pth" in card
        assert ("Not evaluated." in card) == (name == "b")
        assert not any(word in card for word in ("simclr", "None", "steps"))
        assert config["parallax"].keys() == {"file", "config"}
        assert "tag" not in config["pretrained_cfg"]


def onnx(run: Path, out: Path) -> Any:
    """A session of onnxruntime with what is exported."""
    runtime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime is not installed: pip install 'parallax-ssl[onnx]'"
    )
    assert main(["--checkpoint", str(run), "--out", str(out), "--onnx"]) == 0
    return runtime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("encoder", [["encoder=resnet18", "encoder.width=8"], ["encoder=timm:test_vit"]])
def test_onnx_has_the_representations_for_any_batch(encoder: list[str], tmp_path: Path) -> None:
    run = trained(tmp_path / "run", *encoder)
    session = onnx(run, tmp_path / "out")
    for count in (1, 5):
        images = torch.randn(count, 3, 64, 64)
        with torch.inference_mode():
            expected = checkpoint.load_encoder(run)(images)
        (found,) = session.run(["h"], {"images": images.numpy()})
        assert abs(torch.from_numpy(found) - expected).max() <= 1e-5 * expected.abs().max()
    about = json.loads(session.get_modelmeta().custom_metadata_map["parallax"])
    assert (about["input_size"], about["mean"], about["step"], about["data"]) == (
        [3, 64, 64],
        [0.485, 0.456, 0.406],
        7,
        "abc",
    )


def test_onnx_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as Python marks what cannot be imported
    run = trained(tmp_path / "run", "encoder=resnet18", "encoder.width=8")
    assert main(["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--onnx"]) == 2
    assert "onnxruntime is not installed: pip install 'parallax-ssl[onnx]'" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs. It keeps what it is sent by path, and refuses those without the token."""

    server: "HubServer"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received[self.path] = body
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(401, {"error": "who are you?"})
        elif self.path.startswith("/api/models/me/mine/preupload"):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": file["path"], **how} for file in json.loads(body)["files"]]})
        else:  # making the repository, checking the card, the commit
            url = f"{huggingface_hub.constants.ENDPOINT}/me/mine"
            self.answer(200, {"url": url, "commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def answer(self, code: int, content: dict[str, Any]) -> None:
        made = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(made)))
        self.end_headers()
        self.wfile.write(made)

    def log_message(self, *_: Any) -> None: ...


class HubServer(ThreadingHTTPServer):
    received: dict[str, bytes]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(("127.0.0.1", 0), Hub) as server:
        server.received = {}
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield server
        server.shutdown()


VIT = ["encoder=timm:vit_tiny_patch16_224", "encoder.image_size=64"]
PUSH = ["--push-to-hub", "me/mine"]


def test_a_pushed_folder_is_what_was_written(
    tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = trained(tmp_path / "run", *VIT), tmp_path / "out"
    out.mkdir()
    (out / "secret.txt").write_text("not ours")
    assert main(["--checkpoint", str(run), "--out", str(out), *PUSH]) == 0
    assert "/me/mine/commit/0000" in capsys.readouterr().out
    assert b"private" in hub.received["/api/repos/create"]
    lines = map(json.loads, hub.received["/api/models/me/mine/commit/main"].splitlines())
    sent = {line["value"]["path"]: b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
    assert sent.keys() == {"README.md", "config.json", "model.safetensors"}
    assert all((out / name).read_bytes() == content for name, content in sent.items())


@pytest.mark.usefixtures("hub")
def test_a_push_that_fails_says_why_and_where_the_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = trained(tmp_path / "run", *VIT), tmp_path / "out"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["--checkpoint", str(run), "--out", str(out), *PUSH]) == 2
    refused = capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["--checkpoint", str(run), "--out", str(out), *PUSH]) == 2
    offline = capsys.readouterr().err
    for error, reason in ((refused, "401"), (offline, "offline mode is enabled")):
        assert error.startswith("train.export: --push-to-hub me/mine: ")
        assert error.count("\n") == 1
        assert reason in error
        assert f"the files are in {out}" in error
    assert (out / "model.safetensors").exists()
