import numpy as np
import pytest

from scf_fast.config import BackboneConfig
from scf_fast.data import epoch_sampler, open_data


def config(data, **changes):
    return BackboneConfig(data=str(data), output_dir="o", batch_size=16, **changes)


def epoch(source, c):
    sampler = epoch_sampler(c, source, 0, 1)
    return np.concatenate([sampler.indices(0, b) for b in range(sampler.batches_per_epoch)])


def test_two_data_sets_have_label_spaces_of_their_own(faces, tmp_path):
    both = config(f"{faces / 'train'},{faces / 'train' / 'train.rec'}", index_dir=str(tmp_path))
    source = open_data(both)
    assert len(source) == 256 and source.num_classes == 16
    assert np.array_equal(source.labels[128:], source.labels[:128] + 8)
    assert sorted(epoch(source, both)) == list(range(256))
    weighted = config(both.data, data_weights=(3.0, 1.0))
    assert (epoch(source, weighted) < 128).sum() == 192
    with pytest.raises(ValueError, match="one number for each data set of --data, got 3 for 2"):
        epoch_sampler(config(both.data, data_weights=(1.0, 1.0, 1.0)), source, 0, 1)


def test_images_per_identity_and_block_shuffle(faces):
    source = open_data(config(faces / "train"))
    for changes in ({"max_images_per_identity": 4}, {"images_per_identity": 4}):
        seen = epoch(source, config(faces / "train", **changes))
        assert len(seen) == 32 and (np.bincount(source.labels[seen]) == 4).all()
    assert sorted(epoch(source, config(faces / "train", shuffle="block"))) == list(range(128))
    with pytest.raises(ValueError, match="--batch_size 16 is more than the 8 images of an epoch"):
        epoch_sampler(config(faces / "train", max_images_per_identity=1), source, 0, 1)


def test_a_dataset_that_is_not_there_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"give --dataroot, the folder that holds list/ms1m_list\.txt"):
        open_data(BackboneConfig(dataset="ms1m", dataroot=str(tmp_path), output_dir="o"))
