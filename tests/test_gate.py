"""The classifier as a gate: its scores meet the segmenter's Evidence by name, what Evidence says is skipped is what prediction skips, and a gate that knows gains."""
import numpy as np
import pytest
import torch
from torch import nn

from shipnb.catalog import Catalog, read_airbus
from shipnb.choosing import choose_gated, gate_surface
from shipnb.classifiers import CropRecipe, image_gate, score_crops, train_classifier
from shipnb.fleet import make_fleet
from shipnb.inference import Predictor
from shipnb.thresholds import choose, collect_evidence, point_scores, surface

SIZE = (64, 64)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    catalog = read_airbus(make_fleet(tmp_path_factory.mktemp("gate")/"fleet", 12, 3))
    assert 0 < (catalog.counts > 0).sum() < len(catalog)
    return Catalog(catalog.images.assign(category=np.where(catalog.counts > 0, "ship", "no-ship")), catalog.objects, catalog.root)


class Bright(nn.Module):
    """A segmenter without training: bright is ship."""
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x): return self.scale * (x.mean(1, keepdim=True) - 0.5)


@pytest.fixture(scope="module")
def evidence(fleet): return collect_evidence(Bright(), fleet, SIZE, SIZE)


@pytest.fixture(scope="module")
def gate(fleet, tmp_path_factory):
    half = np.arange(len(fleet)) % 2 == 0
    recipe = CropRecipe(size=32, epochs=2, batch_size=3, patience=0, augment="d4")
    return train_classifier(fleet, np.flatnonzero(half), np.flatnonzero(~half), recipe, tmp_path_factory.mktemp("gate"), ("no-ship", "ship"))[0]


def test_scores_meet_the_evidence_by_name(fleet, evidence, gate):
    order = np.random.default_rng(0).permutation(len(fleet))
    shuffled = fleet.subset(order)
    scores = dict(zip(shuffled.images["image"], score_crops(gate, shuffled, 32).tolist()))
    assert np.allclose(evidence.with_gates(scores, "classifier").gates, score_crops(gate, fleet, 32), atol=1e-5)
    with pytest.raises(ValueError, match="no score to image"): evidence.with_gates({k: v for k, v in list(scores.items())[1:]})


def test_every_gate_s_surface_is_the_surface_with_that_gate(fleet, evidence, gate):
    gated = evidence.with_gates(score_crops(gate, fleet, 32))
    by_gate = gate_surface(gated, min_areas=(0, 4))
    for k, one in enumerate(by_gate.surfaces):
        assert np.array_equal(one.dice, surface(gated, (0, 4), gate=by_gate.gates[k]).dice)
        assert by_gate.skipped[k] == (gated.gates < by_gate.gates[k]).mean()
        assert by_gate.skipped_with[k] == (gated.gates < by_gate.gates[k])[gated.counts > 0].mean()


def test_a_gate_that_knows_gains_what_the_empty_images_cost(evidence):
    knows = evidence.with_gates(np.where(evidence.counts > 0, 4.0, -4.0))
    plain, gated = choose(surface(knows, (0, 4)), draws=50), choose_gated(knows, min_areas=(0, 4), draws=50)
    assert gated.score >= plain.score and (gated.gate is None or point_scores(knows, gated)["dice"][knows.counts == 0].eq(1).all())
    hard = surface(knows, (0, 4), gate=0.0)
    open_ = surface(knows, (0, 4))
    empty = (knows.counts == 0).sum() / len(knows)
    with_ships = knows.subset(knows.counts > 0)
    assert np.allclose(hard.dice, empty + (1 - empty) * surface(with_ships, (0, 4)).dice) and np.nanmax(hard.dice) >= np.nanmax(open_.dice)


def test_prediction_skips_the_images_that_evidence_says(fleet, gate):
    """Evidence on the images' own grid, a point with a gate, and a Predictor that asks the classifier: the same pixels, and the segmenter does not see what is skipped."""
    some, seen = fleet.subset(np.arange(6)), []
    gated = collect_evidence(Bright(), some, SIZE).with_gates(score_crops(gate, some, 32))
    middle = float(np.floor(np.median(gated.gates) * 64) / 64)
    point = choose(surface(gated, (0,), gate=middle), draws=50)
    assert point.gate == middle and 0 < point.skipped < 1

    class Counted(Bright):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    predictor = Predictor([Counted()], some.shape(0), SIZE, point.logit, point.min_area, rules=point, gate=image_gate(gate, 32))
    found = [predictor.predict(some.read_image(i)) for i in range(len(some))]
    assert [int((o.labels > 0).sum()) for o in found] == point_scores(gated, point)["pred_area"].tolist()
    assert len(seen) == (gated.gates >= middle).sum() < len(some)
