"""Presets against a transcription of PyGAS's configurations made apart from the data files."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gas_triton import presets
from gas_triton.datasets import Dataset, generate, known_names
from gas_triton.training import TrainConfig, _Run

# preset, dataset | layers hidden dropout | parts batch steps | lr decay decay_last | clip epochs | options
# of the model; - for none, t and f for true and false.
TRANSCRIPTION = """
cora-gcn               Cora            | 2 16 0.5    | 40 10 -    | 0.01 5e-4 0    | 1.0 200  |
citeseer-gcn           CiteSeer        | 2 16 0.5    | 24 8 -     | 0.01 5e-4 0    | - 200    |
pubmed-gcn             PubMed          | 2 16 0.5    | 8 4 -      | 0.01 5e-4 0    | 1.0 200  |
coauthor-cs-gcn        CoauthorCS      | 2 64 0.5    | 2 1 -      | 0.01 1e-3 0    | 1.0 200  |
coauthor-physics-gcn   CoauthorPhysics | 2 64 0.5    | 4 2 -      | 0.01 1e-3 0    | - 200    |
amazon-computers-gcn   AmazonComputers | 2 64 0.5    | 32 16 -    | 0.01 1e-3 0    | 1.0 200  |
amazon-photo-gcn       AmazonPhoto     | 2 64 0.5    | 32 16 -    | 0.01 1e-3 0    | - 200    |
wikics-gcn             WikiCS          | 2 33 0.25   | 32 16 -    | 0.02 5e-4 0    | 1.0 200  |
cora-gat               Cora            | 2 8 0.6     | 40 10 -    | 0.005 5e-4 0   | 1.0 400  | hidden_heads=8 out_heads=1
citeseer-gat           CiteSeer        | 2 8 0.6     | 24 8 -     | 0.005 5e-4 0   | - 400    | hidden_heads=8 out_heads=1
pubmed-gat             PubMed          | 2 8 0.6     | 4 1 -      | 0.01 1e-3 0    | - 400    | hidden_heads=8 out_heads=8
coauthor-cs-gat        CoauthorCS      | 2 8 0.6     | 8 2 -      | 0.005 0.01 0   | - 400    | hidden_heads=8 out_heads=1
coauthor-physics-gat   CoauthorPhysics | 2 8 0.6     | 4 1 -      | 0.005 0.01 0   | - 400    | hidden_heads=8 out_heads=1
wikics-gat             WikiCS          | 2 14 0.5    | 2 1 -      | 0.007 5e-4 0   | - 400    | hidden_heads=5 out_heads=1
cora-appnp             Cora            | 10 64 0.5   | 4 2 -      | 0.01 5e-3 0    | - 600    | alpha=0.1
citeseer-appnp         CiteSeer        | 10 64 0.5   | 24 6 -     | 0.01 5e-3 0    | 1.0 600  | alpha=0.1
pubmed-appnp           PubMed          | 10 64 0.5   | 4 2 -      | 0.01 5e-3 0    | 1.0 600  | alpha=0.1
coauthor-cs-appnp      CoauthorCS      | 10 64 0.5   | 32 16 -    | 0.01 5e-3 0    | - 600    | alpha=0.2
coauthor-physics-appnp CoauthorPhysics | 10 64 0.5   | 2 1 -      | 0.01 5e-3 0    | 1.0 600  | alpha=0.2
amazon-computers-appnp AmazonComputers | 10 64 0.5   | 4 2 -      | 0.01 5e-3 0    | - 600    | alpha=0.2
amazon-photo-appnp     AmazonPhoto     | 10 64 0.5   | 16 8 -     | 0.01 5e-3 0    | 1.0 600  | alpha=0.2
wikics-appnp           WikiCS          | 2 64 0.4    | 4 2 -      | 0.02 5e-4 0    | - 600    | alpha=0.11
cora-gcn2              Cora            | 64 64 0.6   | 2 1 -      | 0.01 0.01 5e-4 | - 1000   | alpha=0.1 theta=0.5
citeseer-gcn2          CiteSeer        | 32 256 0.7  | 40 20 -    | 0.01 0.01 5e-4 | 1.0 1000 | alpha=0.1 theta=0.6
pubmed-gcn2            PubMed          | 16 256 0.5  | 4 2 -      | 0.01 5e-4 5e-4 | - 1000   | alpha=0.1 theta=0.4
coauthor-cs-gcn2       CoauthorCS      | 16 64 0.5   | 16 8 -     | 0.01 0.01 5e-4 | - 1000   | alpha=0.1 theta=0.5
coauthor-physics-gcn2  CoauthorPhysics | 16 64 0.5   | 2 1 -      | 0.01 0.01 5e-4 | 1.0 1000 | alpha=0.1 theta=0.5
amazon-computers-gcn2  AmazonComputers | 16 64 0.2   | 32 16 -    | 0.01 0.01 5e-4 | 1.0 300  | alpha=0.1 theta=0.5
amazon-photo-gcn2      AmazonPhoto     | 16 64 0.5   | 4 2 -      | 0.01 0.01 5e-4 | 1.0 1000 | alpha=0.1 theta=0.5
wikics-gcn2            WikiCS          | 4 128 0.5   | 4 2 -      | 0.01 5e-4 5e-4 | - 1000   | alpha=0.1 theta=0.5
reddit-gcn             Reddit2         | 2 256 0.5   | 200 100 2  | 0.01 0 0       | - 400    | drop=f norm=f res=f
ppi-gcn                PPI             | 2 1024 0.0  | 20 2 10    | 0.005 0 0      | - 1000   | drop=f norm=t res=t linear=t
flickr-gcn             Flickr          | 2 256 0.3   | 24 12 2    | 0.01 0 0       | - 400    | drop=t norm=t res=f
yelp-gcn               Yelp            | 2 512 0.0   | 40 5 4     | 0.01 0 0       | - 500    | drop=f norm=f res=t linear=f
arxiv-gcn              ogbn-arxiv      | 3 256 0.5   | 80 40 2    | 0.01 0 0       | - 300    | drop=f norm=t res=f
products-gcn           ogbn-products   | 3 256 0.3   | 7 1 4      | 0.005 0 0      | - 300    | drop=f norm=f res=f
reddit-gcn2            Reddit2         | 4 256 0.5   | 200 100 2  | 0.01 0 0       | - 400    | drop=t norm=t res=f shared=f alpha=0.1 theta=0.5
ppi-gcn2               PPI             | 9 2048 0.2  | 20 2 10    | 0.001 0 0      | 1.0 2000 | drop=t norm=f res=t shared=f alpha=0.5 theta=1.0
arxiv-gcn2             ogbn-arxiv      | 4 256 0.3   | 40 20 2    | 0.01 0 0       | - 500    | drop=f norm=t res=f shared=t alpha=0.2 theta=0.5
flickr-gcn2            Flickr          | 8 256 0.5   | 24 12 2    | 0.01 0 0       | - 400    | drop=t norm=t res=f shared=f alpha=0.1 theta=0.5
yelp-gcn2              Yelp            | 2 512 0.0   | 40 5 4     | 0.01 0 0       | - 500    | drop=f norm=f res=f shared=f alpha=0.2 theta=0.5
products-gcn2          ogbn-products   | 5 128 0.0   | 150 1 151  | 0.001 0 0      | - 240    | drop=f norm=f res=f shared=f alpha=0.1 theta=0.5
ppi-pna                PPI             | 5 2048 0.2  | 20 2 10    | 0.001 0 0      | 1.0 300  | drop=t norm=t res=t aggr=mean
arxiv-pna              ogbn-arxiv      | 3 256 0.5   | 40 20 2    | 0.005 0 0      | - 500    | drop=f norm=t res=f aggr=mean
flickr-pna             Flickr          | 4 64 0.5    | 24 12 2    | 0.005 0 0      | - 500    | drop=t norm=t res=f aggr=mean,max
yelp-pna               Yelp            | 3 512 0.0   | 40 5 4     | 0.005 0 0      | 1.0 400  | drop=f norm=f res=t aggr=mean
products-pna           ogbn-products   | 3 256 0.3   | 150 1 151  | 0.001 0 0      | - 150    | drop=f norm=f res=f aggr=mean
reddit-pna-jk          Reddit2         | 3 128 0.5   | 200 100 2  | 0.005 0 0      | 1.0 400  | drop=t norm=t res=t aggr=mean,max
"""  # noqa: E501
SHORT_NAMES = {"drop": "drop_input", "norm": "batch_norm", "res": "residual", "shared": "shared_weights"}
LARGE = ("reddit", "ppi", "flickr", "yelp", "arxiv", "products")


def transcribed() -> dict[str, dict[str, Any]]:
    """What the table says, without fields that a preset leaves at their defaults."""
    found = {}
    for line in TRANSCRIPTION.strip().splitlines():
        cells = [cell.split() for cell in line.split("|")]
        (name, dataset), (layers, hidden, dropout), (parts, batch, steps), rates, (clip, epochs), options = cells
        model = name.removeprefix(max(n for n in (*LARGE, *SMALL) if name.startswith(f"{n}-")) + "-")
        fields: dict[str, Any] = {
            "dataset": dataset, "model": model.upper().replace("-", "_"), "layers": int(layers), "hidden": int(hidden),
            "dropout": float(dropout), "num_parts": int(parts), "batch_size": int(batch), "lr": float(rates[0]),
            "weight_decay": float(rates[1]), "weight_decay_last": float(rates[2]), "epochs": int(epochs),
            "grad_norm": None if clip == "-" else float(clip), "max_steps": None if steps == "-" else int(steps),
            "model_options": {}, "history_tier": "auto" if name.startswith(LARGE) else "device",
            "fill_histories": True, "full_evaluation": not name.startswith(LARGE),
            "edge_dropout": 0.8 if name in ("products-gcn2", "products-pna") else 0.0,
        }  # fmt: skip
        for option in options:
            short, _, value = option.partition("=")
            if short == "aggr":
                fields["model_options"]["aggregators"] = value.split(",")
                fields["model_options"]["scalers"] = ["identity", "amplification"]
            else:
                known = {"t": True, "f": False}
                number = float(value) if "." in value else known[value] if value in known else int(value)
                fields["model_options"][SHORT_NAMES.get(short, short)] = number
        found[name] = fields
    return found


SMALL = (
    "cora", "citeseer", "pubmed", "coauthor-cs", "coauthor-physics", "amazon-computers", "amazon-photo", "wikics",
)  # fmt: skip
TRANSCRIBED = transcribed()


def test_the_presets_are_those_of_the_benchmarks() -> None:
    assert len(TRANSCRIBED) == 48
    assert set(presets.names()) == set(TRANSCRIBED)
    assert len(presets.names()) == 48


@pytest.mark.parametrize("name", sorted(TRANSCRIBED))
def test_every_number_is_the_one_of_pygas(name: str, tmp_path: Path) -> None:
    expected = dict(TRANSCRIBED[name])
    dataset, config = presets.load(name)
    assert dataset == expected.pop("dataset")
    # and everything that the table does not name is the default
    assert config == TrainConfig(**expected)
    decays = (config.weight_decay, config.weight_decay_last, config.lr, config.dropout)
    # PyYAML without OmegaConf reads 5e-4 as text
    assert all(type(number) is float and math.isfinite(number) for number in decays)
    assert dataset in known_names(tmp_path)


def test_names_in_any_spelling_and_options_of_ones_own() -> None:
    assert presets.load("Cora_GCN") == presets.load("cora-gcn")
    assert presets.read("reddit-pna_jk") == presets.read("reddit-pna-jk")
    presets.read("cora-gcn2")["model_options"]["alpha"] = 0.9
    assert presets.read("cora-gcn2")["model_options"]["alpha"] == 0.1


def test_unknown_names_say_which_are_known() -> None:
    for name in ("cora-gcm", "", None):
        with pytest.raises(ValueError, match=rf"preset must be one of .*cora-gcn, .*reddit-pna-jk, got {name!r}"):
            presets.load(name)  # type: ignore[arg-type]


def test_the_overview_has_a_line_for_each() -> None:
    header, *lines = presets.overview().splitlines()
    assert header.split()[:4] == ["preset", "model", "dataset", "layers"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[:48]}
    assert set(cells) == set(presets.names())
    assert " ".join(cells["pubmed-gcn"]) == "GCN PubMed 2 16 0.5 0.01 0.0005 - 1.0 200 8 4 -"
    assert " ".join(cells["products-pna"]) == "PNA ogbn-products 3 256 0.3 0.001 - - - 150 150 1 151"


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return generate(400, 3000, num_classes=4, num_features=8)


@pytest.mark.parametrize("name", presets.names())
def test_models_take_the_options_of_their_presets(dataset: Dataset, name: str) -> None:
    _, config = presets.load(name)
    config = replace(config, hidden=8, layers=min(config.layers, 4), num_parts=2, batch_size=1, history_tier="device")
    run = _Run(dataset, config, torch.device("cpu"), None)
    loss = run._step(run.loader.batch([0]), run.labelled[0])
    assert loss is not None
    assert math.isfinite(loss)
    assert not any(torch.isnan(parameter).any() for parameter in run.model.parameters())
