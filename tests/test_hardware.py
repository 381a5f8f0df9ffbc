import csv
import datetime
import tomllib
from collections import Counter
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path

import pytest

from bursar.errors import BadInput, UnknownName
from bursar.hardware import Accelerator, Cluster, accelerator, accelerators, by_driver_name, cluster

ROWS = accelerators()
IDS = [row.name for row in ROWS]
each_row = pytest.mark.parametrize("row", ROWS, ids=IDS)

NOT_A_FIGURE = {"name", "title", "vendor", "year", "sources", "price_source", "price_date"}
FIGURES = [f.name for f in fields(Accelerator) if f.name not in NOT_A_FIGURE]


def unsourced(row: Accelerator) -> set[str]:
    """Fields that hold something and have no source, and sources of fields that hold nothing."""
    held = {name for name in FIGURES if getattr(row, name) not in (None, (), {})}
    return held ^ {name for name, source in row.sources.items() if source.strip()}


@each_row
def test_every_figure_has_a_source_and_every_source_a_figure(row: Accelerator) -> None:
    assert unsourced(row) == set()


def test_a_figure_without_a_source_would_be_noticed() -> None:
    assert unsourced(replace(accelerator("l4"), tdp_watts=None)) == {"tdp_watts"}
    assert unsourced(replace(accelerator("l4"), scaleup_bytes_per_s=1.0)) == {"scaleup_bytes_per_s"}


def test_every_driver_name_stands_in_exactly_one_row() -> None:
    names = Counter(name for row in ROWS for name in row.driver_names)
    assert {name for name, rows in names.items() if rows > 1} == set()
    for row in ROWS:
        for name in row.driver_names:
            assert by_driver_name(name) is row


def test_the_table_holds_only_fields_the_record_has() -> None:
    table = tomllib.loads(files("bursar").joinpath("catalog", "hardware.toml").read_text(encoding="utf-8"))
    known = {f.name for f in fields(Accelerator)} - {"title", "sources"} | {"source"}
    assert set().union(*table.values()) <= known
    assert list(table) == IDS


@each_row
def test_a_narrower_dtype_is_never_slower(row: Accelerator) -> None:
    order = ["fp64", "fp32", "tf32", "fp16", "fp8", "fp6", "fp4"]
    rates = [row.peak_flops_per_s[dtype] for dtype in order if dtype in row.peak_flops_per_s]
    assert rates == sorted(rates)
    bf16, fp16 = (row.peak_flops_per_s.get(dtype) for dtype in ("bf16", "fp16"))
    if bf16 is not None:
        assert bf16 >= row.peak_flops_per_s.get("tf32", row.peak_flops_per_s.get("fp32", 0))
        assert fp16 in (None, bf16) or (row.name == "mi100" and fp16 == 2 * bf16)  # CDNA 1 alone


@each_row
def test_figures_are_of_a_believable_size(row: Accelerator) -> None:
    assert {"fp16", "bf16"} & set(row.peak_flops_per_s)
    assert all(1e12 < rate < 2e16 for rate in row.peak_flops_per_s.values())
    assert 16e9 <= row.memory_bytes <= 300e9
    assert 0.3e12 <= row.memory_bytes_per_s <= 8e12
    assert 2017 <= row.year <= 2026


@each_row
def test_usable_memory_lies_between_the_gigabytes_and_the_gibibytes_of_the_name(row: Accelerator) -> None:
    assert 0.95 < row.usable_bytes / row.memory_bytes < 2**30 / 1e9 + 1e-6


@each_row
def test_no_measured_matmul_beats_its_peak(row: Accelerator) -> None:
    for dtype, measured in row.measured_matmul_flops_per_s.items():
        assert measured < row.peak(dtype)


@each_row
def test_no_price_stands_without_its_source_and_date(row: Accelerator) -> None:
    assert (row.usd_per_gpu_hour is None) == (row.price_source is None) == (row.price_date is None)


# the traps: figures that well-known tables get wrong


@pytest.mark.parametrize(
    ("name", "dtype", "dense", "sparse"),
    [
        ("h100-sxm", "bf16", 989.4e12, 1979e12),
        ("h100-sxm", "fp8", 1979e12, 3958e12),
        ("h100-sxm", "tf32", 494.7e12, 989.4e12),
        ("h100-pcie", "bf16", 756e12, 1513e12),
        ("h100-nvl", "bf16", 835.5e12, 1671e12),
        ("h200", "bf16", 989.4e12, 1979e12),
        ("b200", "bf16", 2250e12, 4500e12),
        ("a100-80g-sxm", "bf16", 312e12, 624e12),
        ("l4", "bf16", 121e12, 242e12),
        ("l40s", "bf16", 362e12, 733e12),
        ("rtx-4090", "bf16", 165.2e12, 330.3e12),
    ],
)
def test_peaks_are_dense(name: str, dtype: str, dense: float, sparse: float) -> None:
    assert accelerator(name).peak(dtype) == dense
    assert dense == pytest.approx(sparse / 2, rel=0.015)


def test_an_h100_pcie_is_not_an_h100_sxm() -> None:
    assert accelerator("h100-pcie").peak("bf16") == 756e12
    assert accelerator("h100-pcie").memory_bytes_per_s == 2e12
    assert by_driver_name("NVIDIA H100 80GB HBM3").name == "h100-sxm"
    assert by_driver_name("NVIDIA H100 PCIe").name == "h100-pcie"


def test_an_l4_reads_300_gigabytes_a_second() -> None:
    assert accelerator("l4").memory_bytes_per_s == 300e9


def test_fp32_of_an_a100_is_not_its_tf32() -> None:
    a100 = accelerator("a100-80g-sxm")
    assert a100.peak("fp32") == 19.5e12
    assert a100.peak("bf16") / a100.peak("fp32") == 16  # the lecture's 16x
    assert accelerator("h100-sxm").peak("bf16") / accelerator("h100-sxm").peak("fp32") == pytest.approx(14.8, abs=0.05)


def test_an_h100_peak_is_its_tensor_cores_times_its_clock() -> None:
    assert accelerator("h100-sxm").peak("bf16") == pytest.approx(528 * 512 * 2 * 1830e6, rel=1e-4)


def test_a_device_of_an_mi250x_is_half_the_card() -> None:
    gcd = accelerator("mi250x")
    assert gcd.peak("bf16") == 383e12 / 2
    assert gcd.memory_bytes == 128e9 / 2
    assert "GCD" in gcd.title


def test_the_ridge_of_an_h100_is_295_flop_per_byte() -> None:
    assert accelerator("h100-sxm").ridge("bf16") == pytest.approx(989.4 / 3.35)
    assert round(accelerator("h100-sxm").ridge("bf16"), 1) == 295.3


def test_an_80_gb_h100_shows_81559_mib() -> None:
    assert accelerator("h100-sxm").usable_bytes == 81559 * 2**20 == 85_520_809_984
    assert accelerator("h100-sxm").assumptions == ()


def test_unknown_usable_memory_falls_back_to_the_nominal_and_says_so() -> None:
    tpu = accelerator("tpu-v4")
    assert tpu.usable_bytes == tpu.memory_bytes == 32_000_000_000
    assert tpu.assumptions == ("usable memory of tpu-v4 assumed to be its nominal 32.0 GB",)


# asking


def test_a_dtype_the_device_lacks_names_those_it_has() -> None:
    with pytest.raises(BadInput, match="v100-32g-sxm has no known peak in bf16; the catalogue knows fp64 fp32 fp16"):
        accelerator("v100-32g-sxm").peak("bf16")


def test_torch_spellings_of_a_dtype_are_understood() -> None:
    h100 = accelerator("h100-sxm")
    assert h100.peak("torch.bfloat16") == h100.peak("bfloat16") == h100.peak("bf16")


def test_h100_alone_is_an_error_that_names_the_three() -> None:
    with pytest.raises(UnknownName) as raised:
        accelerator("h100")
    assert str(raised.value) == (
        "no accelerator 'h100'; did you mean h100-sxm, h100-pcie, h100-nvl? "
        "Add a row to catalog/hardware.toml or pass --on local."
    )


@pytest.mark.parametrize(
    "name", ["NVIDIA H100", "H100", "NVIDIA A100", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""]
)
def test_a_driver_name_is_matched_in_full_or_not_at_all(name: str) -> None:
    with pytest.raises(UnknownName, match=r"Add a row to catalog/hardware\.toml"):
        by_driver_name(name)


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("h100-sxm", "h100-sxm", 1),
        ("1024xh100-sxm", "h100-sxm", 1024),
        ("4xmi300x", "mi300x", 4),
        ("mi300x", "mi300x", 1),
        ("8 x RTX-4090", "rtx-4090", 8),
    ],
)
def test_a_cluster_is_a_count_and_a_name(text: str, name: str, count: int) -> None:
    found = cluster(text)
    assert (found.accelerator.name, found.count) == (name, count)
    assert cluster(found.name) == found


@pytest.mark.parametrize("text", ["0xh100-sxm", "-4xh100-sxm", "1.5xl4", "manyxl4", "xl4", "nanxl4", "1e30xl4"])
def test_a_bad_count_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="as in 8xh100-sxm"):
        cluster(text)


def test_a_good_count_of_a_bad_name_names_the_near_ones() -> None:
    with pytest.raises(UnknownName, match="did you mean h100-sxm"):
        cluster("8xh100")


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "8"])
def test_a_cluster_made_by_hand_is_checked_too(count) -> None:
    with pytest.raises(BadInput):
        Cluster(accelerator("l4"), count)


def test_the_peak_of_a_cluster_is_that_of_all_its_accelerators() -> None:
    assert cluster("8xh100-sxm").peak("bf16") == 8 * 989.4e12


def test_export_variants_differ_from_their_models_in_nvlink_alone() -> None:
    # 400 GB/s both ways in place of 900 (H100) and 600 (A100)
    for name, model in (("h800", "h100-sxm"), ("a800-80g", "a100-80g-sxm")):
        variant, of = accelerator(name), accelerator(model)
        assert variant.scaleup_bytes_per_s == 200e9
        assert variant.peak("bf16") == of.peak("bf16")
        assert variant.memory_bytes_per_s == of.memory_bytes_per_s


def test_every_accelerator_of_the_published_runs_is_in_the_catalogue() -> None:
    table = Path(__file__).parent.parent / "data" / "published" / "runs.csv"
    with table.open(encoding="utf-8", newline="") as file:
        named = {row["gpu"] for row in csv.DictReader(line for line in file if not line.startswith("#"))}
    assert named - {""} <= set(IDS)


def test_a_price_is_of_this_year_and_of_a_believable_size() -> None:
    priced = [row for row in ROWS if row.usd_per_gpu_hour is not None]
    assert len(priced) >= 9
    for row in priced:
        assert 0.1 < row.usd_per_gpu_hour < 20
        assert datetime.date.fromisoformat(row.price_date).year == 2026
