import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sharding.command import UserError
from tests.census import wait_until
from tests.train.runs import settings
from train.config import load_config
from train.evaluate.__main__ import main as evaluate
from train.pretrain import pretrain
from train.processes.distributed import World
from train.report import differences, evaluated, main, read_runs, render, serve

ATTACK = "<script>alert(1)</script>"
FEW = ["knn.k=5", "retrieve.k=5", "project.perplexity=5"]


def make_run(path: Path, *overrides: str, **files: list[Any]) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(load_config(None, overrides).to_yaml())
    for name, records in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_differences_are_those_settings_that_are_not_the_same(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", "run.dir=a", "views.0.size=64")
    other = make_run(tmp_path / "b", "run.dir=b", "method=byol", "views=simclr", "optim.learning_rate=7")
    found = differences(read_runs([first, other]))
    assert found["views.0.size"] == ["64", "224"]
    assert found["method.name"] == ["simclr", "byol"]
    assert found["method.tau"] == [None, "0.996"]
    assert found["method.temperature"][1] is None
    assert "run.dir" not in found
    assert "encoder.name" not in found
    assert differences(read_runs([first])) == {}


def test_intervals_after_a_start_are_not_steady(tmp_path: Path) -> None:
    speeds = [{"step": 1, "speed": 9000}, {"step": 2, "speed": 100}, {"step": 3, "speed": 8000, "resumed_at": 2}]
    (run,) = read_runs([make_run(tmp_path / "a", metrics=speeds)])
    assert run.steady("speed") == [100]
    (short,) = read_runs([make_run(tmp_path / "b", metrics=speeds[:1])])
    assert short.steady("speed") == [9000]
    assert short.steady("loss") == []


@pytest.mark.parametrize(("logged", "drawn"), [(0, 0), (5000, 5000), (5001, 2501), (15001, 3751)])
def test_of_very_many_records_every_so_many_are_drawn(logged: int, drawn: int, tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "a", metrics=[{"step": step} for step in range(logged)])])
    steps = [record["step"] for record in run.thinned()]
    assert len(steps) == drawn
    assert len({after - before for before, after in pairwise(steps)}) <= 1


def test_runs_of_one_name_are_called_by_their_paths_and_a_run_given_twice_is_one(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / folder / "run") for folder in "ab"]
    assert [run.name for run in read_runs([*paths, paths[0]])] == [str(path) for path in paths]
    assert [run.name for run in read_runs(paths[:1])] == ["run"]


def test_what_cannot_be_read_is_said_and_the_rest_is_read(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", metrics=[{"step": 1}])
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    (path / "evaluation.jsonl").write_text("{}\n")
    (path / "config.yaml").write_text("method: {name: future}\n")
    (run,) = read_runs([path])
    assert run.config is None
    assert run.settings == {"method": {"name": "future"}}
    assert len(run.records) == 1
    for part in ("unknown method 'future'", "metrics.jsonl, line 2", "evaluation.jsonl, line 1"):
        assert any(part in problem for problem in run.problems), part


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the directory of a run, found neither config.yaml nor"):
        read_runs([tmp_path])


def test_values_of_different_runs_stand_beside_each_other_in_their_own_order(tmp_path: Path) -> None:
    knn = {"pretrained": {"knn": {"recall@5": 2.0, "recall@10": 3.0}}, "untrained": {"knn": {"recall@5": 1.0}}}
    first = make_run(tmp_path / "a", evaluation=[{"results": knn}])
    other = make_run(tmp_path / "b", evaluation=[{"results": {"pretrained": {"knn": {"recall@5": 4.0}}}}])
    rows = [(row["name"], row["run"], row["found"]) for row in evaluated(read_runs([first, other]))]
    assert rows == [
        ("recall@5", "a", {"pretrained": 2.0, "untrained": 1.0}),
        ("recall@5", "b", {"pretrained": 4.0}),
        ("recall@10", "a", {"pretrained": 3.0, "untrained": None}),
    ]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped after 4 of 6 steps, then finished; evaluated."""
    path = tmp_path_factory.mktemp("report") / "mine"
    for steps in ("optim.steps=4", "optim.steps=6"):
        assert pretrain(load_config(None, settings(shards, path, steps, "optim.schedule=constant")), World())
    assert evaluate(["--checkpoint", str(path), "--protocol", "knn", "retrieve", "project", *FEW, "--untrained"]) == 0
    return path


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    assert main([str(run), "--images", "2"]) == 0
    return (run / "report.html").read_text()


def text_of(page: str) -> str:
    """What a reader sees of a section, without the scripts."""
    return re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL))


def test_the_page_has_everything_of_a_run(page: str, run: Path) -> None:
    text = text_of(page)
    assert "mine simclr resnet18 6 of 6 " in text
    for part in ("loss", "gradient norm", "images per second", "rankme", "mine: no sign of collapse"):
        assert part in text, part
    assert re.search(r"knn k=5 T=0.07 top-1 % mine 6 [\d.]+ [\d.]+ 20 of \S+, held out", text)
    assert "started at step 0: commit" in text
    assert "started at step 4: commit" in text
    pictures = re.findall(r'<img src="data:image/webp;base64,([^"]+)"', page)
    neighbours, views = (Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures)
    assert views.size == (200 * 1.7 * 3, 200 * 2.0 * 2)  # two images with two views each
    with Image.open(run / "pictures" / "pretrained" / "neighbours.png") as sheet:
        assert neighbours.size == sheet.size
    (columns,) = read_runs([run])[0].maps
    assert len(columns["thumbnail"]) == 20
    assert all(page.count(thumbnail) == 1 for thumbnail in columns["thumbnail"])
    assert read_runs([run])[0].starts[0]["libraries"]["torch"] in text


def test_the_page_fetches_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.search(r"<(?:link|script|img|image|iframe)[^>]*(?:src|href)=\"(?!data:)", page)


def test_nothing_that_a_run_says_becomes_markup(tmp_path: Path) -> None:
    record = {"step": 1, ATTACK: 1.0, "loss": 2.0, "collapse": ATTACK}
    result = {"results": {ATTACK: {ATTACK: {ATTACK: ATTACK}}}, "step": ATTACK, "test": {"shards": ATTACK}}
    path = make_run(
        tmp_path / "<script>alert(1)<", "data.shards=" + ATTACK, metrics=[record], evaluation=[result],
        provenance=[{"commit": ATTACK}],
    )  # fmt: skip
    (path / "config.yaml").write_text(f'"{ATTACK}": 1\n')
    made = render(read_runs([path]), [{"run": ATTACK, "problem": ATTACK}])
    assert "<script>alert" not in made
    assert made.count("&lt;script&gt;alert(1)") >= 10


def test_several_runs_of_different_methods_one_of_them_just_begun(run: Path, tmp_path: Path) -> None:
    signs = [
        {"step": 5, "loss": 1.0},
        *({"step": s, "loss": 1.0, "collapse": "dimensional collapse"} for s in (10, 15)),
    ]
    other = make_run(tmp_path / "other", "method=byol", "data.shards=/nowhere", metrics=signs)
    begun = make_run(tmp_path / "begun", "method=dino")
    out = tmp_path / "new" / "all.html"
    assert main([*map(str, (run, other, begun)), "--out", str(out), "--images", "1"]) == 0
    text = text_of(out.read_text())
    assert re.search(r"What is different between the runs: mine other begun .* method.name simclr byol dino ", text)
    assert "other: collapsed in 2 of 3 records. First at step 10: dimensional collapse" in text
    assert "other and the runs that see the same /nowhere: no such directory" in text
    assert "begun dino" in text
    assert "begun: not recorded" in text


def test_a_run_whose_first_record_and_pictures_are_torn(tmp_path: Path) -> None:
    path = make_run(tmp_path / "begun")
    (pictures := path / "pictures" / "pretrained").mkdir(parents=True)
    (pictures / "map.json").write_text('{"thumbnail": ["data')
    (pictures / "neighbours.png").write_bytes(b"\x89PNG")
    (path / "metrics.jsonl").write_text('{"step": 1, "lo')
    (tmp_path / "study.json").write_text('{"study": "runs')
    made = text_of(render(read_runs([path]), []))
    assert "study.json, line 1: not a whole record" in made
    assert "metrics.jsonl, line 1: not a whole record" in made
    assert "No step has been logged yet" in made
    assert "Not evaluated yet" in made
    assert "map.json, line 1: not a whole record" in made
    assert "cannot identify image file" in made


def test_a_watched_run_is_shown_as_it_is_until_ctrl_c(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", metrics=[{"step": 4711, "loss": 1.0}])
    said, pages = io.StringIO(), list[str]()

    def visit() -> None:
        try:
            wait_until(lambda: "Ctrl-C ends it" in said.getvalue())
            for step in (4711, 4712):
                with (path / "metrics.jsonl").open("a") as file:
                    file.write(f'{{"step": {step}, "loss": 1.0}}\n')
                with urllib.request.urlopen(said.getvalue().split()[0]) as answer:
                    pages.append(answer.read().decode())
        finally:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    with redirect_stdout(said), ThreadPoolExecutor(1) as pool:
        visited = pool.submit(visit)
        assert main([str(path), "--watch", "0", "--images", "0"]) == 130
    signal.signal(signal.SIGINT, before)
    visited.result()
    assert said.getvalue().startswith("http://127.0.0.1:")
    for step, page in zip((4711, 4712), pages, strict=True):
        assert f"resnet50 {step} " in text_of(page)
        assert '<meta http-equiv="refresh" content="30">' in page


def test_ctrl_c_while_a_page_is_made_is_not_lost() -> None:
    def page() -> str:
        raise KeyboardInterrupt

    with serve(page, 0) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(urllib.request.urlopen, f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(KeyboardInterrupt):
            server.handle_request()


def test_what_the_user_can_put_right_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_run(tmp_path / "run")
    with serve(str, 0) as server:
        assert main([str(path), "--watch", str(server.server_port), "--images", "0"]) == 2
    assert f"--watch {server.server_port}: Address already in use; choose" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    assert main([str(path), "--images", "0"]) == 2
    assert "pip install 'parallax-ssl[report]'" in capsys.readouterr().err


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def screenshot(page: Path, out: Path, scheme: int, width: int) -> np.ndarray:
    """A picture (height, width, 3); ``scheme`` 1 is light, 0 dark. Nothing may be refused or raised."""
    assert BROWSER
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += [f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},2500"]
    flags += ["--virtual-time-budget=10000", f"--user-data-dir={out}-profile", f"--screenshot={out}"]
    done = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    assert not re.search(r"Uncaught|Refused|violates", done.stderr), done.stderr
    with Image.open(out) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.skipif(not BROWSER, reason="no browser is installed: apt-get install chromium")
@pytest.mark.parametrize(("scheme", "paper"), [(1, 0xFFFFFF), (0, 0x14171C)])
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_draws_curves_and_maps(scheme: int, paper: int, width: int, tmp_path: Path) -> None:
    records = [{"step": step, "loss": step % 7, "rankme": step % 5} for step in range(1, 50)]
    page = tmp_path / "page.html"
    run = make_run(tmp_path / "run", metrics=records)
    (run / "pictures" / "pretrained").mkdir(parents=True)
    points = {name: list(range(20)) for name in ("id", "class", "thumbnail", "pca x", "pca y")}
    (run / "pictures" / "pretrained" / "map.json").write_text(json.dumps(points | {"color": ["#ff00ff"] * 20}))
    page.write_text(render(read_runs([run]), []))
    drawn = screenshot(page, tmp_path / "page.png", scheme, width)
    point = [0.7 * channel + 0.3 * (paper >> shift & 0xFF) for channel, shift in ((255, 16), (0, 8), (255, 0))]
    assert (np.abs(drawn - point).max(-1) < 3).sum() > 20 * 10
    colors = drawn.astype(int) @ [1 << 16, 1 << 8, 1]
    assert (colors == paper).mean() > 0.7
    assert (colors == 0x3B82F6).sum() > 1000  # of which the mark of the run has at most 200
