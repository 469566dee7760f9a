"""
Tests of the page of figures: what it collects, what it says is missing, and what --all runs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shutil
import subprocess

import pytest

import generate_screenshots
import shared

# A script that draws a figure of one pixel.
DRAWING_SCRIPT = """
from pathlib import Path

from PIL import Image

path = Path(__file__)
(path.parent / "out").mkdir(exist_ok=True)
Image.new("RGB", (1, 1)).save(path.parent / "out" / (path.stem + ".png"))
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The folder of a repository that has only the two tools."""
    for name in ("shared.py", "generate_screenshots.py"):
        shutil.copy(shared.ROOT / name, tmp_path)
    monkeypatch.setattr(generate_screenshots, "ROOT", tmp_path)
    return tmp_path


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def draw(path, title=""):
    fig, ax = shared.figure(title)
    shared.save_figure(fig, path)


def run(repository, *options):
    command = [sys.executable, repository / "generate_screenshots.py", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_it_collects_figures_and_says_what_is_missing(repository):
    write(repository / "part_1/demo_a.py")
    draw(repository / "part_1/out/demo_a.png", "It is <so>")
    write(repository / "part_1/out/demo_a.json", '{"share": 0.25, "curve": [1, 2]}')
    write(repository / "part_1/demo_b.py")

    done = run(repository)
    assert done.returncode == 0, done.stderr
    assert "1 figures" in done.stdout
    assert "not run yet: python part_1/demo_b.py" in done.stdout
    assert "demo_a.py" not in done.stdout

    assert (repository / "screenshots/part_1_demo_a.png").exists()
    page = (repository / "screenshots/index.html").read_text()
    assert "It is &lt;so&gt;" in page
    assert "<td>share</td><td>0.25</td>" in page
    assert "curve" not in page
    assert "http" not in page, "the page must open from disk, without a network"


def test_all_runs_every_script_without_a_figure(repository):
    write(repository / "part_1/demo_a.py", DRAWING_SCRIPT)
    write(repository / "part_1/train.py", DRAWING_SCRIPT)
    write(repository / "part_2/demo_broken.py", "raise SystemExit(3)")
    write(repository / "part_10/train_flow.py", DRAWING_SCRIPT)

    # This one has its figure already.
    write(repository / "part_1/demo_done.py", "raise SystemExit('it was run again')")
    draw(repository / "part_1/out/demo_done.png")

    # This one would draw, but only torchrun may start it.
    write(repository / "part_1/train_ddp.py", DRAWING_SCRIPT)

    done = run(repository, "--all")
    assert done.returncode == 1
    assert "4 scripts to run" in done.stdout
    assert "4 figures" in done.stdout
    assert "FAILED: python part_2/demo_broken.py" in done.stdout
    assert done.stdout.count("FAILED") == 1
    assert not (repository / "part_1/out/train_ddp.png").exists()

    # Part 10 comes after Part 2, and training comes before demos.
    expected = ["part_1/train.py", "part_1/demo_a.py", "part_2/demo_broken.py"]
    expected.append("part_10/train_flow.py")
    places = [done.stdout.index(f"] {script}") for script in expected]
    assert places == sorted(places)


def test_a_script_with_a_name_of_its_own_belongs_to_the_figures_if_it_draws(repository):
    write(repository / "part_10/quantize.py", "save_figure(fig, path)")
    write(repository / "part_10/weights.py", "print('no figure')")
    write(repository / "part_10/test_quantize.py", "save_figure(fig, path)")
    write(repository / "part_10/train_lcm.py")
    write(repository / "part_10/demo_lcm.py")
    names = [script.name for script in generate_screenshots.find_scripts()]
    assert names == ["train_lcm.py", "quantize.py", "demo_lcm.py"]


def test_ctrl_c_stops_all(repository):
    write(repository / "part_1/demo_a.py", "raise SystemExit(130)")
    write(repository / "part_1/demo_b.py", "raise SystemExit('this must not run')")
    with pytest.raises(SystemExit) as stop:
        generate_screenshots.run_scripts(generate_screenshots.find_scripts())
    assert stop.value.code == 130


def test_a_script_is_not_run_if_an_earlier_one_has_built_it(repository):
    train = repository / "part_1/train.py"
    write(train, DRAWING_SCRIPT)
    scripts = [train, train]
    assert generate_screenshots.run_scripts(scripts) == []

    train.write_text("raise SystemExit('it was run again')")
    assert generate_screenshots.run_scripts(scripts) == []


def test_figures_belong_to_the_script_they_are_named_after(repository):
    script = repository / "part_1/demo_a.py"
    write(script)
    for name in ("demo_a", "demo_a_again", "demo_ab", "demo"):
        draw(repository / f"part_1/out/{name}.png")
    figures = generate_screenshots.find_figures(script)
    assert [path.stem for path in figures] == ["demo_a", "demo_a_again"]


def test_a_train_script_shows_its_own_numbers(repository):
    main, other = repository / "part_1/train_main.py", repository / "part_1/train_other.py"
    write(repository / "part_1/out/metrics.json", '{"val_loss": 1.5}')
    write(repository / "part_1/out/train_other.json", '{"accuracy": 0.75}')
    assert generate_screenshots.read_numbers(main) == {"val_loss": 1.5}
    assert generate_screenshots.read_numbers(other) == {"accuracy": 0.75}
    assert generate_screenshots.read_numbers(repository / "part_1/demo_a.py") == {}


def test_a_long_list_of_numbers_is_folded(repository):
    numbers = ", ".join(f'"name_{i}": {i}' for i in range(10))
    write(repository / "part_1/out/demo_a.json", "{" + numbers + "}")
    draw(repository / "part_1/out/demo_a.png")
    figure = repository / "part_1/out/demo_a.png"
    card = generate_screenshots.make_card(repository / "part_1/demo_a.py", figure, "demo_a.png")
    shown, folded = card.split("<summary>2 more numbers</summary>")
    assert shown.count("<tr>") == 8 and folded.count("<tr>") == 2
