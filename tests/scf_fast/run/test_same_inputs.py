"""Data and weights that move between a run and its resume."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch

from scf_fast import config as configuration
from scf_fast.calibrate import choose_images
from scf_fast.config import ConfidenceConfig
from scf_fast.features.open import cache_key
from scf_fast.pipelines.formats.recordio import RecordWriter
from scf_fast.pipelines.index import open_source
from scf_fast.pipelines.sources.base import ImageFiles
from scf_fast.pipelines.sources.digest import content_digest
from scf_fast.run import folder as run_folder
from scf_fast.run import same_inputs

LABELS = [0, 0, 1, 1, 2, 2, 3, 3]


def write_records(folder, labels=LABELS, image=lambda i: bytes([i] * 9)):
    folder.mkdir(parents=True)
    with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
        for i, label in enumerate(labels):
            writer.write_image(i + 1, float(label), image(i))
    return folder


def write_folder(folder):
    for i, label in enumerate(LABELS):
        (folder / f"{label}").mkdir(parents=True, exist_ok=True)
        (folder / f"{label}" / f"{i}.png").write_bytes(bytes([i] * 9))
    return folder


def stage2(root, data, **changes):
    values = {"saved_bkb": str(root / "b.pth"), "saved_fc": str(root / "f.pth"), "resume": True, **changes}
    return ConfidenceConfig(data=str(data), output_dir=str(root / "run"), normalization="published", **values)


def begin(root, data):
    """Leaves what a run does that has begun."""
    for name in ("b.pth", "f.pth"):
        torch.save({"weight": torch.full((40, 40), float(len(name)))}, root / name)
    config = stage2(root, data)
    (root / "run").mkdir()
    configuration.save(config, root / "run" / run_folder.CONFIG_FILE, {})
    same_inputs.note(config, open_source(list(config.data_sets)))


def go_on(config):
    """Does what a resumed run does before it trains."""
    run_folder.claim(config)
    same_inputs.check(config, open_source(list(config.data_sets)))


def said_in(caplog):
    """Returns what has been said of inputs, whatever else is logged."""
    return [record.getMessage() for record in caplog.records if record.name == same_inputs.log.name]


@pytest.mark.parametrize("write", [write_records, write_folder])
def test_data_may_move(write, tmp_path, monkeypatch, caplog):
    begin(tmp_path, write(tmp_path / "A"))
    caplog.set_level(logging.INFO, same_inputs.log.name)
    spellings = [tmp_path / "A", f"{tmp_path}/A/", "A", tmp_path / "link"]
    (tmp_path / "link").symlink_to(tmp_path / "A")
    monkeypatch.chdir(tmp_path)
    for data in spellings:
        go_on(stage2(tmp_path, data))
    assert not said_in(caplog)
    (tmp_path / "link").unlink()
    shutil.move(tmp_path / "A", tmp_path / "deep" / "B")
    moved = [tmp_path / "deep" / "B", "deep/B/", *([tmp_path / "deep/B/train.rec"] if write is write_records else [])]
    for data in moved:
        caplog.clear()
        go_on(stage2(tmp_path, data))
        (said,) = said_in(caplog)
        assert said.startswith(f"--data has moved from {tmp_path}/A to {data}") and "so the run goes on" in said


def test_a_rec_for_its_folder_and_a_copy_in_another_format(tmp_path, caplog):
    caplog.set_level(logging.INFO, same_inputs.log.name)
    begin(tmp_path, write_records(tmp_path / "A"))
    go_on(stage2(tmp_path, tmp_path / "A" / "train.rec"))
    go_on(stage2(tmp_path, write_folder(tmp_path / "B")))
    assert [message.split(":")[1] for message in said_in(caplog)] == [
        " the same images and identities, so the run goes on"
    ] * 2


@pytest.mark.parametrize(
    ("labels", "image", "others"),
    [(LABELS[::-1], None, "other identities"), (LABELS, lambda i: bytes([i] * 8 + [7]), "other images")],
)
def test_other_data_are_another_run(labels, image, others, tmp_path):
    begin(tmp_path, write_records(tmp_path / "A"))
    before = (tmp_path / "run" / same_inputs.FILE).read_bytes()
    write_records(tmp_path / "B", labels, image or (lambda i: bytes([i] * 9)))
    with pytest.raises(ValueError) as raised:
        go_on(stage2(tmp_path, tmp_path / "B"))
    assert f"holds a different run (data '{tmp_path}/A' -> '{tmp_path}/B', which has {others})" in str(raised.value)
    assert (tmp_path / "run" / same_inputs.FILE).read_bytes() == before


def test_data_that_change_in_their_place(tmp_path, caplog):
    begin(tmp_path, write_records(tmp_path / "A"))
    shutil.rmtree(tmp_path / "A")
    write_records(tmp_path / "A", image=lambda i: bytes([i] * 8 + [7]))
    go_on(stage2(tmp_path, tmp_path / "A"))
    assert "--data" in caplog.text and "is not what it was when the run began" in caplog.text
    shutil.rmtree(tmp_path / "A")
    write_records(tmp_path / "A", LABELS[::-1])  # identities were numbered in another way
    with pytest.raises(ValueError, match=r"the images have other labels than when the run in .* began"):
        go_on(stage2(tmp_path, tmp_path / "A"))


def test_weights_may_move_too(tmp_path, caplog):
    begin(tmp_path, write_records(tmp_path / "A"))
    caplog.set_level(logging.INFO, same_inputs.log.name)
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "b.pth", tmp_path / "moved" / "backbone.pth")
    config = stage2(tmp_path, tmp_path / "A", saved_bkb=str(tmp_path / "moved" / "backbone.pth"))
    go_on(config)
    assert "--saved_bkb has moved from" in caplog.text and "the same weights" in caplog.text
    torch.save({"weight": torch.zeros(40, 40)}, tmp_path / "moved" / "backbone.pth")
    with pytest.raises(ValueError, match=r"holds a different run .*, which has other weights"):
        go_on(config)
    (tmp_path / "moved" / "backbone.pth").rename(tmp_path / "b.pth")
    caplog.clear()
    go_on(stage2(tmp_path, tmp_path / "A"))  # exported again in its place, by a newer version for instance
    assert "is not what it was when the run began" in caplog.text


def test_a_folder_without_digests_is_what_it_was(tmp_path):
    begin(tmp_path, write_records(tmp_path / "A"))
    (tmp_path / "run" / same_inputs.FILE).unlink()
    go_on(stage2(tmp_path, tmp_path / "A"))
    shutil.move(tmp_path / "A", tmp_path / "B")
    for content in (None, "{", "[1]", '{"data": 3}', '{"data": {"path": "elsewhere", "labels": "0", "content": "0"}}'):
        if content is not None:
            (tmp_path / "run" / same_inputs.FILE).write_text(content)
        with pytest.raises(ValueError, match="holds a different run"):
            go_on(stage2(tmp_path, tmp_path / "B"))


def test_an_image_that_cannot_be_read_does_not_end_the_run(tmp_path):
    data = write_folder(tmp_path / "A")
    source = open_source(data)
    before = same_inputs.digests_of_data(source)
    (data / "0" / "0.png").unlink()
    after = same_inputs.digests_of_data(source)
    assert after["labels"] == before["labels"] and after["content"] != before["content"]


def test_cache_and_calibration_know_data_that_have_moved(tmp_path):
    begin(tmp_path, write_records(tmp_path / "A"))
    keys = {cache_key({"a": torch.ones(1)}, open_source(tmp_path / "A"), "published", "fp32")}
    shutil.move(tmp_path / "A", tmp_path / "B")
    for data in (tmp_path / "B", tmp_path / "B" / "train.rec"):
        keys.add(cache_key({"a": torch.ones(1)}, open_source(data), "published", "fp32"))
        with pytest.raises(ValueError, match="the model was trained on these people"):
            choose_images(tmp_path / "run", str(data))
    assert len(keys) == 1
    _, chosen = choose_images(tmp_path / "run", str(write_records(tmp_path / "C", [0, 0, 1, 1])))
    assert np.array_equal(chosen, [True] * 4)


def test_index_and_stored_embeddings_move_with_the_data(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_records(tmp_path / "A")
    write_folder(tmp_path / "A" / "faces")
    digests = set()
    for data in ("A", "B"):
        faces = tmp_path / data / "faces"
        images = ImageFiles(sorted(faces.glob("*/*.png")))
        open_source(tmp_path / data)
        digests.add((content_digest(images, "model"), content_digest(open_source(tmp_path / data), "model")))
        if data == "A":
            shutil.move(tmp_path / "A", tmp_path / "B")
    assert len(digests) == 1 and caplog.text.count("indexed in") == 1


def test_a_launch_goes_on_after_its_data_have_moved(faces, stage1, flags, fork_ranks, tmp_path, capsys, monkeypatch):
    data, run = tmp_path / "B", tmp_path / "run"
    shutil.copytree(faces / "train", data)
    shutil.copytree(stage1[0], run)
    status, output = fork_ranks(0, *flags["stage1"], "--data", data, "--output_dir", run, "--resume")
    assert status == 0 and f"--data has moved from {faces}/train to {data}: the same images and identities" in output
    assert "nothing to do: the run is at step 8 of 8" in output
    assert json.loads((run / same_inputs.FILE).read_text())["data"]["path"] == str(data)
    assert json.loads((stage1[0] / same_inputs.FILE).read_text())["data"]["path"] == str(faces / "train")
