"""`tcpa-train inspect`: what it writes, what its page does in a browser, and what it refuses."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_runs import SIZE, make_config, make_splits

import tcpa
from tcpa.cli import UsageError
from tcpa.train.__main__ import main
from tcpa.train.backbones import load_backbone
from tcpa.train.inspect import maps
from tcpa.train.inspect.run import run_inspect
from tcpa.train.jobs.run import run
from tcpa.train.options.inspect import InspectConfig

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome here")

TCPA = tcpa.TCPAConfig(
    cls_pool_size=3, image_pool_size=5, cls_top_k=2, image_top_k=3, random_selection_epochs=0
)
TINY = "test_vit"


def make_images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4) -> Path:
    generator = np.random.default_rng(0)
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(0, 200, (40, 50, 3), np.uint8)
            pixels[..., place % 3] |= 0xC0
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def save_adapter(folder: Path, config=TCPA, name: str = TINY, seed: int = 1, **options) -> Path:
    """Save an adapter on the shared weights of `weights_file`, or on others."""
    torch.manual_seed(9)
    vit, _ = load_backbone(name, "none", image_size=SIZE)
    torch.manual_seed(seed)
    model = tcpa.wrap(vit, config, num_classes=2, normalization=([0.5] * 3, [0.5] * 3), **options)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The weights under all adapters of this file."""
    from safetensors.torch import save_file

    torch.manual_seed(9)
    vit, _ = load_backbone(TINY, "none", image_size=SIZE)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file({key: value.contiguous() for key, value in vit.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_images(folder / "images")
    save_adapter(folder / "tcpa")
    save_adapter(folder / "tcpa-later", seed=2)
    save_adapter(folder / "vpt", tcpa.VPTConfig(length=2))
    save_adapter(folder / "linear", None)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The page of the quick demo."""
    output = tmp_path_factory.mktemp("demo") / "inspection"
    return run_inspect(
        InspectConfig(demo=True, quick=True, output=output, show=2, patches=("4,4",))
    )


def inspect(inputs: Path, weights: Path, output: Path, *runs: str, **options) -> Path:
    # Few figures: they take the time.
    defaults = {"device": "cpu", "weights": str(weights), "show": 1, "patches": ("0,1",)}
    options = defaults | {"images": inputs / "images"} | options
    paths = tuple(inputs / name for name in runs)
    return run_inspect(InspectConfig(runs=paths, output=output, **options))


def numbers(page: Path) -> dict:
    return json.loads((page.parent / "numbers.json").read_text())


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


# What is written.


def test_the_demo_shows_everything(demo: Path) -> None:
    page, found = Page(demo), numbers(demo)
    assert [model["name"] for model in found["models"]] == ["TCPA", "VPT-deep", "no prompt"]
    files = sorted(path.name for path in (demo.parent / "figures").iterdir())
    for part in (
        "selection-tcpa-image-1-block-1",
        "usage-tcpa-image-pool",
        "usage-tcpa-cls-pool",
        "overlap-tcpa",
        "change-tcpa",
        "attention-image-2-class-token-vpt-deep-2d",
        "attention-image-2-patch-in-row-4-column-4-no-prompt-3d",
        "attention-on-prompts",
        "features-tcpa",
        "features-no-prompt",
        "attention-rank",
        "feature-entropy",
    ):
        assert f"{part}.png" in files
    for name in files:
        with Image.open(demo.parent / "figures" / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
    titles = [attributes["id"] for attributes in page.named("h2")]
    assert titles == ["models", "selections", "attention", "feature-space", "diversity", "left-out"]
    # Three models, two images, two tokens, flat and as surfaces.
    rows = [a for a in page.named("img") if a["data-name"].startswith("attention-image")]
    assert len(rows) == 3 * 2 * 2 * 2
    assert all(attributes["alt"] for attributes in page.named("img"))
    assert "TCPA has no selection" not in page.text
    assert "VPT-deep has no selection maps, usage, overlap and change of selections" in page.text


def test_the_page_needs_nothing_from_elsewhere(demo: Path) -> None:
    text = demo.read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text).replace("http-equiv", "")
    assert "default-src 'none'" in text and not re.search(r"@import|url\((?!#)", text)


def test_the_selection_maps_hold_the_top_k_lists(demo: Path) -> None:
    found = numbers(demo)["models"][0]["selection"]
    orders = np.array(found["shown_images_top_k"])
    blocks, images, patches, top_k = orders.shape
    rects = [a for a in Page(demo).named("rect") if "data-k" in a]
    assert len(rects) == images * blocks * patches and top_k == 5
    # By image, then by block.
    expected = orders.swapaxes(0, 1).reshape(-1, top_k)
    shown = np.array([[int(entry) for entry in a["data-k"].split()] for a in rects])
    np.testing.assert_array_equal(shown, expected)
    colours = {(a["data-k"].split()[0], a["fill"]) for a in rects}
    assert len({colour for _, colour in colours}) == len(colours)


def test_a_small_map_has_room_for_the_names_of_its_axes() -> None:
    order = np.arange(8).reshape(4, 2) % 3
    text = maps._svg(order, (2, 2), "#picture", ["#111111"] * 3, 0)
    found = re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', text)
    assert found is not None and text.count("<rect") == 4
    left, _, width, height = map(float, found.groups())
    # "patch column" is about 60 wide, in the middle of the columns.
    assert width + left >= 60 and height >= width


def test_the_numbers_agree_with_each_other(demo: Path) -> None:
    found = numbers(demo)
    tcpa_model, vpt, bare = found["models"]
    pool = tcpa_model["selection"]["image_pool"]
    seen = np.array(pool["seen"])
    np.testing.assert_allclose(seen.sum(1), 5, rtol=1e-6)
    np.testing.assert_allclose(np.array(pool["first"]).sum(1), 1, rtol=1e-6)
    assert pool["dead"] == (seen == 0).sum(1).tolist()
    assert tcpa_model["selection"]["epochs"] == [0, 1, 2]
    assert len(tcpa_model["selection"]["change_to_the_last"]) == 2
    assert vpt["selection"] is None and "without TCPA" in vpt["no_selection"]
    shares = np.array(bare["attention_shares"]["blocks"])
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(shares[:, 2], 0)
    assert (np.array(vpt["attention_shares"]["blocks"])[:, 2] > 0).all()
    for model in found["models"]:
        assert np.array(model["attention_of_shown_images"]).shape[:2] == (2, 1)
        assert len(model["tsne"]) == len(found["images"]["names"]) == 60
        assert 0 <= model["separation"]["knn_accuracy"] <= 100
        for name in ("attention_rank", "feature_rank"):
            assert min(model["diversity"][name]["mean"]) >= 1
    assert tcpa_model["accuracy_percent"] > 10


def test_adapters_beside_each_other_and_what_does_not_apply(inputs, weights, tmp_path) -> None:
    page = inspect(
        inputs,
        weights,
        tmp_path / "out",
        *("tcpa", "vpt", "linear", "tcpa-later"),
        block=2,
        head=1,
        max_images=6,
        checkpoints=(inputs / "tcpa-later", inputs / "tcpa"),
    )
    found = numbers(page)
    names = [model["name"] for model in found["models"]]
    assert names == ["TCPA (tcpa)", "VPT-deep", "linear probe", "TCPA (tcpa-later)", "no prompt"]
    assert found["attention_of"] == {
        "block": 2,
        "head": 1,
        "queries": ["class token", "patch in row 0, column 1"],
    }
    assert found["images"]["left_out"] == 2 and len(found["images"]["names"]) == 6
    assert found["images"]["classes"] == ["cat", "dog"]
    bare, linear = found["models"][4], found["models"][2]
    assert bare["tsne"] == linear["tsne"] and bare["separation"] == linear["separation"]
    selection = found["models"][0]["selection"]
    assert selection["epochs"] == [1, 2]
    (change,) = selection["change_to_the_last"]
    assert all(0 < value < 1 for value in change["replaced"])
    text = Page(page).text
    assert "linear probe has no selection maps" in text
    assert "2 further images were not read" in text


def test_a_finished_run_with_its_checkpoints(tmp_path) -> None:
    config = make_config(tmp_path / "runs", weights="none", epochs=2, top_k=2)
    result = run(config, make_splits())
    folder = next(path.parent for path in (tmp_path / "runs").rglob("result.json"))
    torch.manual_seed(0)
    images = make_images(tmp_path / "images")
    options = {"images": images, "output": tmp_path / "out", "show": 1, "device": "cpu"}
    options |= {"patches": ("0,0",)}
    weights = tmp_path / "vit.safetensors"
    # The run's backbone has random weights, which come from its seed.
    page = run_inspect(InspectConfig(runs=(folder,), **options))
    assert numbers(page)["models"][0]["accuracy_percent"] == pytest.approx(result.accuracy)
    described = (folder / "config.json").read_text()
    named = described.replace('"weights": "none"', '"weights": "my.pth"')
    assert named != described
    (folder / "config.json").write_text(named)
    with pytest.raises(UsageError, match="--weights: got none, expected the file my"):
        run_inspect(InspectConfig(runs=(folder,), **options))
    (folder / "config.json").write_text(described)
    from safetensors.torch import save_file

    torch.manual_seed(3407)
    vit, _ = load_backbone(TINY, "none", image_size=SIZE)
    save_file({key: value.contiguous() for key, value in vit.state_dict().items()}, weights)
    page = run_inspect(InspectConfig(runs=(folder,), weights=str(weights), **options))
    (model, _) = numbers(page)["models"]
    assert model["accuracy_percent"] == pytest.approx(result.accuracy)
    assert model["selection"]["epochs"][-1] == 2
    (folder / "result.json").unlink()
    with pytest.raises(UsageError, match="expected a finished run; unfinished: 2 of 2 epochs"):
        run_inspect(InspectConfig(runs=(folder,), **options))


def test_a_run_that_maps_the_logits_of_the_models_own_head(tmp_path) -> None:
    options = {"method": "autovp+tcpa", "mapping": "frequency"}
    config = make_config(tmp_path / "runs", weights="none", epochs=1, **options)
    result = run(config, make_splits())
    folder = next(path.parent for path in (tmp_path / "runs").rglob("result.json"))
    images = make_images(tmp_path / "images")
    options = {"output": tmp_path / "out", "show": 1, "device": "cpu", "patches": ("0,0",)}
    page = run_inspect(InspectConfig(runs=(folder,), images=images, **options))
    mapped, bare = numbers(page)["models"]
    assert mapped["accuracy_percent"] == pytest.approx(result.accuracy)
    assert bare["name"] == "no prompt" and mapped["selection"] is not None


def test_images_without_classes_and_in_grey(inputs, weights, tmp_path, capsys) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("L", (30, 60), 80 * number).save(folder / f"{number}.jpg")
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    cut = (folder / "1.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    page = inspect(inputs, weights, tmp_path / "out", "tcpa", images=folder)
    found = numbers(page)
    assert found["images"]["names"] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [item["name"] for item in found["images"]["skipped"]] == ["broken.png", "cut.jpg"]
    assert found["models"][0]["separation"] is None and found["models"][0]["tsne"] is None
    text = Page(page).text
    assert "Class separation does not apply: the images have no classes" in text
    assert "2 images could not be read" in text and "cut.jpg" in text
    assert "skipped broken.png: Truncated File Read\nskipped cut.jpg: " in capsys.readouterr().out


# The page in a browser.


PROBE = """
<script>
window.problems = [];
window.onerror = function (text) { window.problems.push(String(text)); };
document.addEventListener("securitypolicyviolation", function (e) {
  window.problems.push("blocked " + e.blockedURI); });
window.addEventListener("load", function () {
  // Windows without a screen are 500 pixels wide at least.
  document.documentElement.style.width = "WIDTHpx";
  var patch = document.querySelectorAll("rect[data-k]")[PATCH];
  patch.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
  var images = Array.from(document.querySelectorAll("img")), root = document.documentElement;
  var outputs = Array.from(patch.closest(".maps").querySelectorAll("output"));
  var wide = Array.from(document.querySelectorAll("body *")).filter(function (e) {
    return !e.closest(".wide, svg") && e.getBoundingClientRect().right > WIDTH + 1; });
  root.setAttribute("data-report", JSON.stringify({
    problems: window.problems,
    told: outputs.map(function (o) { return o.textContent; }),
    hot: document.querySelectorAll("rect.hot").length,
    broken: images.filter(function (i) { return !(i.complete && i.naturalWidth > 0); }).length,
    images: images.length, figures: document.querySelectorAll("figure").length,
    empty: Array.from(document.querySelectorAll("figure")).filter(function (f) {
      var box = f.getBoundingClientRect(); return box.height < 80 || box.width < 150; }).length,
    wide: wide.map(function (e) { return e.tagName + "." + e.className; }).slice(0, 5)
  }));
});
</script>
"""


def in_browser(page: Path, folder: Path, width: int, patch: int) -> dict:
    """Open a copy of a page with a script that points at a patch; return what it saw."""
    copy = folder / "copy.html"
    text = page.read_text(encoding="utf-8")
    probe = PROBE.replace("PATCH", str(patch)).replace("WIDTH", str(width))
    copy.write_text(text.replace("<style>", probe + "<style>", 1), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1000"]
    done = subprocess.run(
        [*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    report = re.search(r'data-report="([^"]*)"', done.stdout)
    assert report is not None, done.stderr[-2000:]
    return json.loads(report[1].replace("&quot;", '"').replace("&amp;", "&"))


@browser
def test_the_page_works_in_a_narrow_browser(demo: Path, tmp_path) -> None:
    # The twelfth patch of the second map: row 1, column 3 of block 2.
    seen = in_browser(demo, tmp_path, width=400, patch=64 + 11)
    assert seen["problems"] == []
    assert seen["broken"] == 0 and seen["empty"] == 0
    assert seen["images"] == len(Page(demo).named("img"))
    assert seen["figures"] == len(Page(demo).named("figure"))
    orders = np.array(numbers(demo)["models"][0]["selection"]["shown_images_top_k"])[:, 0, 11]
    assert seen["told"] == [
        f"row 1, column 3: prompt {first}, then {', '.join(map(str, others))}"
        for first, *others in orders.tolist()
    ]
    assert seen["hot"] == len(orders)
    # Nothing but tables and matrices is wider than the window, and those scroll by themselves.
    assert seen["wide"] == []


# What is refused.


def test_refusals(inputs, weights, tmp_path) -> None:
    other = save_adapter(tmp_path / "other", name="vit_tiny_patch16_224")
    tuned = tmp_path / "altered"
    shutil.copytree(inputs / "tcpa", tuned)
    content = json.loads((tuned / "adapter_config.json").read_text())
    content["backbone"]["fingerprint"] = "0" * 64
    (tuned / "adapter_config.json").write_text(json.dumps(content))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text("{")
    holder = tmp_path / "holder"
    shutil.copytree(inputs / "tcpa", holder / "adapter-of-mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"nonsense")
    cases = [
        ((inputs / "tcpa", other), {}, "got .*other, an adapter for vit_tiny_patch16_224.* at "
         f"{SIZE}x{SIZE} .*expected one for test_vit.* at .* as .*tcpa; inspect it by itself"),
        ((inputs / "tcpa", tuned), {}, "altered, an adapter for test_vit.* .weights 000000000000."),
        ((inputs / "tcpa",), {"weights": "none"}, "expected one for test_vit.*, which was loaded"),
        ((inputs / "tcpa",), {"backbone": "vit_tiny_patch16_224", "weights": "none"},
         "an adapter for test_vit.*, expected one for vit_tiny_patch16_224, which was loaded"),
        ((inputs / "tcpa",), {"backbone": "vit_tinny"}, "got 'vit_tinny'"),
        ((damaged,), {}, "adapter_config.json is not what tcpa saves"),
        ((holder,), {}, "did you mean .*adapter-of-mine"),
        ((empty,), {}, "expected the folder of a finished run or of an adapter"),
        ((tmp_path / "nowhere",), {}, "RUNS: got .*nowhere, expected the folder of a finished"),
        ((inputs / "tcpa",), {"checkpoints": (empty,)}, "--checkpoints: got .*empty"),
        ((inputs / "tcpa",), {"images": empty}, "--images: got .*empty without any image"),
        ((inputs / "tcpa",), {"images": tmp_path / "no"}, "--images: got .*no, expected a folder"),
        ((inputs / "tcpa",), {"images": broken}, "none of the 1 images .*a.png: cannot identify"),
        ((inputs / "tcpa",), {"block": 99}, "--block: got 99, expected 1 to 6"),
        ((inputs / "tcpa",), {"head": 99}, "--head: got 99, expected 1 to"),
        ((inputs / "tcpa",), {"patches": ("2,9",)}, "--patches: got 2,9, .* 2 x 2 patches"),
    ]  # fmt: skip
    for runs, options, message in cases:
        given = {"images": inputs / "images", "device": "cpu", "weights": str(weights)} | options
        config = InspectConfig(runs=runs, output=tmp_path / "out", **given)
        with pytest.raises(UsageError, match=message):
            run_inspect(config)
    assert not (tmp_path / "out" / "index.html").exists()


def test_outputs_are_not_overwritten_unless_they_are_ours(inputs, weights, demo, tmp_path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"--output: got .*mine, which holds other files .thesis"):
        inspect(inputs, weights, mine, "tcpa")
    page = tmp_path / "page"
    page.mkdir()
    (page / "index.html").write_text("a page of my own")
    with pytest.raises(UsageError, match="expected a new or empty folder"):
        inspect(inputs, weights, page, "tcpa")
    assert (page / "index.html").read_text() == "a page of my own"
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match=r"--output: got .*file, expected a folder that can be"):
        inspect(inputs, weights, file, "tcpa")
    out = tmp_path / "out"
    shutil.copytree(demo.parent, out)
    before = {path.name for path in (out / "figures").iterdir()}
    inspect(inputs, weights, out, "tcpa")
    after = {path.name for path in (out / "figures").iterdir()}
    assert after != before and not any("image-2" in name for name in after)


def test_options_that_do_not_fit(capsys) -> None:
    for words, message in (
        (["inspect"], "RUNS: got none, expected a finished run or an adapter"),
        (["inspect", "x"], "--images: got none, expected a folder of images"),
        (["inspect", "x", "--demo"], "RUNS: got x, expected none with --demo"),
        (["inspect", "--demo", "--images", "x"], "--images: got x, expected nothing with --demo"),
        (["inspect", "x", "--images", "y", "--quick"], "--quick"),
        (["inspect", "--demo", "--show", "0"], "--show: got 0, expected 1 or more"),
        (["inspect", "--demo", "--block", "0"], "--block: got 0, expected 1 or more; they are"),
        (["inspect", "--demo", "--patches", "3"], "--patches: got '3', expected ROW,COLUMN"),
        (["inspect", "--demo", "--seed", "-1"], "--seed: got -1"),
    ):
        assert main(words) == 2
        assert f"tcpa-train: {message}" in capsys.readouterr().err
