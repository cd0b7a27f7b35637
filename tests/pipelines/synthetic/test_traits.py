import dataclasses

import numpy as np

from scf_fast.pipelines.synthetic.traits import Identity


def test_an_identity_has_at_least_twenty_continuous_parameters_drawn_from_their_ranges():
    fields = dataclasses.fields(Identity)
    ranges = {field.name: field.metadata["range"] for field in fields}
    assert len(ranges) >= 20
    draws = [dataclasses.asdict(Identity.draw(np.random.default_rng(number))) for number in range(200)]
    for name, (low, high) in ranges.items():
        values = np.array([draw[name] for draw in draws])
        assert values.min() >= low and values.max() <= high and np.ptp(values) > 0.9 * (high - low), name
