"""The probe: every number within the sampling error the tool states, and a wrong scheme found for what it is."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from bursar.errors import BadInput, MissingExtra, UnknownName
from bursar.probe import SCHEMES, Place, compare, fan, initialise, probe
from bursar.probe.check import checks
from bursar.probe.measure import remarks_of, watching
from bursar.probe.schemes import truncated_variance, truncation
from bursar.probe.sweep import parse_depths
from bursar.probe.theory import moments
from bursar.report import probe as page
from bursar.workload.modules.small import Linear
from command import ask

N_IN, N_OUT = 16384, 32  # the notes' layer


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def found():
    return checks()


def ran(capsys, *words):
    """Exit code, stdout and stderr of ``bursar probe``."""
    return ask(capsys, "probe", *words)


def row(found, scheme, where, quantity="output E[y²]"):
    return next(x for x in found if (x.scheme, x.where, x.quantity) == (scheme, where, quantity))


def within(x, truth):
    """The formula is the issue's figure, and the measurement meets it within the error the row itself states."""
    return x.predicted == pytest.approx(truth, rel=1e-4) and abs(x.measured - truth) <= 4 * x.standard_error


# ---- initialisers


def test_every_figure_of_the_notes_is_met_within_the_stated_sampling_error(found):
    wide, narrow = f"{N_IN} → {N_OUT}", f"{N_OUT} → {N_IN}"
    deviation = row(found, "normal", wide, "output deviation")
    assert within(deviation, 128)
    assert deviation.standard_error < 1.1  # 128 · √(2/(32 · 252))/2
    assert within(row(found, "fan-in", wide), 1)
    assert within(row(found, "xavier", wide), 2 * N_IN / (N_IN + N_OUT))
    assert within(row(found, "xavier", narrow), 2 * N_OUT / (N_IN + N_OUT))
    assert within(row(found, "trunc-normal", wide), 0.97334)
    assert within(row(found, "trunc-normal", f"{N_IN} × {N_OUT}", "weights' σ² n_in"), 0.97334)
    relu = next(x for x in found if x.where.startswith("ReLU"))
    assert within(relu, 0.5)
    assert relu.standard_error < 0.002


def test_the_notes_two_calls_are_flagged(found):
    cut = next(x for x in found if x.scheme == "trunc_normal_")
    assert cut.flag == "bounds ±3 are 384 σ: nothing is truncated; write a=-3*std, b=3*std"
    assert within(cut, 1)
    assert not within(cut, 0.97334)  # the twin: a cut would have been seen
    shape = next(x for x in found if x.scheme == "normal_")
    assert within(shape, 512)
    assert "output variance 512: the std used shape[0], which is fan-out" in shape.flag


def test_all_checks_agree_and_a_formula_ten_percent_off_would_not(found):
    assert [x for x in found if not x.agrees] == []
    narrow = [x for x in found if x.standard_error < 0.02 * x.predicted]
    assert len(narrow) > 20
    wrong = [x for x in narrow if abs(x.measured - 1.1 * x.predicted) <= 4 * x.standard_error]
    assert wrong == []


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("n_in", "n_out"), [(256, 256), (512, 64), (64, 512), (96, 1024), (1024, 96)])
def test_a_scheme_gives_weights_the_variance_of_its_formula(name, n_in, n_out):
    place = Place(n_in, n_out, branches=6)
    w = torch.empty(n_out, n_in)
    SCHEMES[name].fill(w, place)
    assert float(w.square().mean()) == pytest.approx(SCHEMES[name].variance(place), rel=4 * math.sqrt(2 / w.numel()))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("xavier", nn.init.xavier_normal_),
        ("kaiming", lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")),
        ("orthogonal", nn.init.orthogonal_),
    ],
)
def test_on_a_linear_layer_a_scheme_is_torchs_own_to_the_bit(name, theirs):
    layer = nn.Linear(48, 32)
    torch.manual_seed(1)
    initialise(layer, name)
    torch.manual_seed(1)
    assert torch.equal(layer.weight, theirs(torch.empty(32, 48)))
    assert not layer.bias.any()


def test_a_truncated_normals_variance_is_the_integral_of_its_density():
    z = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    assert truncated_variance(-3, 3) == pytest.approx(float((z.square() * density).sum() / density.sum()), abs=1e-4)
    assert truncated_variance(-384, 384) == 1
    w = torch.empty(64, 64)
    SCHEMES["trunc-normal"].fill(w, Place(64, 64))
    assert float(w.abs().max()) <= 3 / 8
    with pytest.raises(BadInput, match="lower bound must be below"):
        truncated_variance(1, -1)


def test_bounds_in_sigma_are_no_fault():
    assert truncation(1 / 128, -3, 3).startswith("bounds ±3 are 384 σ")
    assert truncation(1 / 128, -3 / 128, 3 / 128) == ""
    assert truncation(1.0) == ""


# ---- fans


@pytest.mark.parametrize(
    ("module", "fans"),
    [
        (nn.Linear(5, 7), (5, 7)),
        (Linear(5, 7), (5, 7)),  # stored (in, out), used as x @ w
        (nn.Conv2d(6, 8, 3), (6 * 9, 8 * 9)),
        (nn.Conv2d(6, 8, 3, groups=2), (3 * 9, 4 * 9)),
        (nn.Conv1d(6, 6, 5, groups=6), (5, 5)),
        (nn.ConvTranspose2d(6, 8, 3, groups=2), (3 * 9, 4 * 9)),
        (nn.Embedding(100, 16), (1, 16)),
        (nn.MultiheadAttention(16, 4), (16, 16)),
    ],
    ids=lambda v: str(v)[:30],
)
def test_fan_in_and_fan_out_are_read_off_how_a_weight_is_used(module, fans):
    weight = next(p for p in module.parameters() if p.dim() > 1)
    assert fan(weight, module) == fans


def test_torchs_own_rule_counts_a_grouped_convolutions_outputs_of_every_group():
    conv = nn.Conv2d(6, 8, 3, groups=2)
    assert nn.init._calculate_fan_in_and_fan_out(conv.weight) == (27, 72)
    assert fan(conv.weight, conv) == (27, 36)


def test_a_vector_has_no_fan():
    with pytest.raises(BadInput, match="has no fan-in"):
        fan(nn.Linear(3, 3).bias)


@pytest.mark.parametrize("how", ["x @ w", "x @ w.T", "linear", "einsum"])
def test_a_probe_sees_which_side_of_a_raw_matrix_is_summed(how):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 32) if how == "x @ w" else torch.randn(32, 64))

        def forward(self, x):
            if how == "x @ w":
                return x @ self.w
            if how == "x @ w.T":
                return x @ self.w.T
            if how == "linear":
                return nn.functional.linear(x, self.w)
            return torch.einsum("bi,oi->bo", x, self.w)

    (layer,) = probe(Raw(), torch.randn(128, 64)).layers
    assert (layer.fan_in, layer.fan_out) == (64, 32)
    assert layer.agrees
    after = compare(Raw(), torch.randn(128, 64), init="orthogonal")[1].layers[0]
    assert after.predicted_second_moment == pytest.approx(1, rel=0.1)


# ---- theory against measurement


def nets():
    def conv():
        return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=2, padding=1))

    def mlp(activation):
        return nn.Sequential(nn.Linear(64, 512), activation, nn.Linear(512, 512), activation, nn.Linear(512, 256))

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(128, 512), nn.Linear(128, 512), nn.Linear(512, 128)
            self.norm = nn.RMSNorm(128)

        def forward(self, x):
            y = self.norm(x)
            return x + self.c(nn.functional.silu(self.a(y)) * self.b(y))

    vectors, images = torch.randn(256, 64), torch.randn(32, 3, 12, 12)
    tokens = torch.randint(0, 500, (8, 32))
    return {
        "relu": (mlp(nn.ReLU()), vectors),
        "gelu": (mlp(nn.GELU()), vectors),
        "tanh": (mlp(nn.Tanh()), 3 * vectors),
        "sigmoid": (mlp(nn.Sigmoid()), vectors),
        "leaky": (mlp(nn.LeakyReLU(0.2)), vectors),
        "conv": (conv(), images),
        "batchnorm": (nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 3)), images),
        "swiglu": (Gated(), torch.randn(256, 128)),
        "dropout": (nn.Sequential(nn.Linear(64, 256), nn.Dropout(0.5), nn.Linear(256, 256)), vectors),
        "tokens": (nn.Sequential(nn.Embedding(500, 64), nn.LayerNorm(64), nn.Linear(64, 256)), tokens),
    }


@pytest.mark.parametrize("name", nets())
def test_every_layer_theory_speaks_of_is_met_within_its_tolerance(name):
    model, batch = nets()[name]
    found = probe(model, batch)
    assert [x.name for x in found.layers if x.agrees is not True] == []
    weighted = [x for x in found.layers if x.fan_in is not None]
    assert weighted
    assert weighted[0].tolerance < 0.5


def test_an_rms_norm_written_out_in_functions_is_known_by_its_name():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((64,), 2.0))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    found = probe(nn.Sequential(nn.Linear(64, 64), RMSNorm(), nn.Linear(64, 256)), torch.randn(64, 64))
    assert found.layers[1].predicted_second_moment == 4
    assert [x.agrees for x in found.layers] == [True, True, True]


def test_weights_that_are_not_independent_are_found_by_the_theory_that_takes_them_to_be():
    layer = nn.Linear(64, 256)
    nn.init.constant_(layer.weight, 0.1)
    assert probe(nn.Sequential(layer), 1 + torch.randn(256, 64)).layers[0].agrees is False


def test_a_gaussian_through_an_activation_is_integrated():
    assert moments(torch.relu, 1.0)[0] == pytest.approx(0.5, abs=1e-9)
    assert moments(lambda z: z, 3.0) == pytest.approx((3.0, 2.0), abs=1e-6)  # E[z⁴] = 3


def test_the_prediction_is_fan_in_times_variance_times_the_input_by_hand():
    layer, x = nn.Linear(64, 128), torch.randn(32, 64)
    found = probe(nn.Sequential(layer), x).layers[0]
    layer.requires_grad_(False)
    by_hand = 64 * layer.weight.square().mean() * x.square().mean() + layer.bias.square().mean()
    assert found.predicted_second_moment == pytest.approx(float(by_hand), rel=1e-5)
    assert found.forward_second_moment == pytest.approx(float(layer(x).square().mean()), rel=1e-5)
    assert found.forward_mean == pytest.approx(float(layer(x).mean()), abs=1e-6)


def test_gradient_norm_and_update_are_those_of_a_plain_backward():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(16, 8)

    def loss(model, batch):
        return model(batch).square().mean()

    found = probe(model, x, loss=loss, lr=0.1).layers[0]
    loss(model, x).backward()
    grad, weight = model[0].weight.grad, model[0].weight.detach()
    assert found.gradient_norm == pytest.approx(math.hypot(grad.norm(), model[0].bias.grad.norm()), rel=1e-5)
    assert found.update_to_weight == pytest.approx(float(0.1 * grad.norm() / weight.norm()), rel=1e-5)


# ---- verdicts


def deep(std, depth=24, width=128):
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.ReLU())]
    for m in layers[::2]:
        nn.init.normal_(m.weight, std=std)
    return nn.Sequential(*layers)


def test_growth_by_layer_is_named_with_its_factor():
    found = probe(deep(math.sqrt(32 / 128)), torch.randn(64, 128))  # 32/2 = 16 × per layer
    assert found.verdict == "exploding"
    assert any("second moment grows 1" in x.message and "× per layer: exploding" in x.message for x in found.layers)
    late = found.layers[-2]
    assert (late.growth * 2) ** (1 / 24) == pytest.approx(16, rel=0.2)
    assert probe(deep(math.sqrt(0.5 / 128)), torch.randn(64, 128)).verdict == "vanishing"
    assert probe(deep(math.sqrt(2 / 128)), torch.randn(64, 128)).verdict == "healthy"


def test_the_std_taken_from_shape_0_of_a_linear_layer_is_named():
    layer = nn.Linear(N_IN, N_OUT, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.weight.shape[0]))
    found = probe(nn.Sequential(layer), torch.randn(64, N_IN))
    assert found.verdict == "exploding"
    assert "output variance 512: the std used shape[0], which is fan-out" in found.layers[0].message
    nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.weight.shape[1]))
    right = probe(nn.Sequential(layer), torch.randn(64, N_IN))
    assert (right.verdict, right.layers[0].message) == ("healthy", "")


def test_the_same_std_is_right_for_a_matrix_stored_in_first():
    layer = Linear(N_IN, N_OUT)
    with torch.no_grad():
        layer.weight.normal_(std=1 / math.sqrt(layer.weight.shape[0]))
    assert probe(layer, torch.randn(64, N_IN)).layers[0].message == ""


def test_an_unscaled_layer_is_named():
    layer = Linear(N_IN, N_OUT)
    nn.init.normal_(layer.weight)
    found = probe(layer, torch.randn(64, N_IN))
    assert found.verdict == "exploding"
    assert "output variance 16384: the weights are unscaled" in found.layers[0].message


def test_units_that_never_wake_are_dead():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(64, 32)
    assert probe(model, x).verdict == "healthy"
    nn.init.constant_(model[0].bias, -10)
    found = probe(model, x)
    assert found.verdict == "dead"
    assert found.layers[1].dead_share == 1
    assert "zero on the whole batch" in found.layers[1].message


def test_what_saturates_is_told_as_a_share():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    assert probe(model, torch.randn(64, 64)).layers[1].saturated_share == 0
    assert probe(model, 100 * torch.randn(64, 64)).layers[1].saturated_share > 0.8


def test_a_branch_of_a_residual_stream_and_what_a_norm_rescales_may_be_small():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.f = nn.LayerNorm(64), nn.Linear(64, 64)
            nn.init.normal_(self.f.weight, std=1e-4)
            nn.init.zeros_(self.f.bias)

        def forward(self, x):
            return x + self.f(self.norm(x))

    assert probe(nn.Sequential(Block(), Block()), torch.randn(32, 64)).verdict == "healthy"
    plain = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.normal_(plain[0].weight, std=1e-4)
    assert probe(plain, torch.randn(32, 64)).verdict == "vanishing"


def test_residual_scaling_divides_by_the_branches_that_are_added():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return x + self.b(torch.relu(self.a(x)))

    found = probe(nn.Sequential(*[Block() for _ in range(4)]), torch.randn(32, 64), init="residual-scaled")
    gains = {x.name: x.gain for x in found.layers}
    assert gains["0.a"] == pytest.approx(1, rel=0.1)
    assert gains["3.b"] == pytest.approx(1 / 4, rel=0.1)


def test_bounds_that_cut_nothing_are_told_of_the_layer_that_was_drawn_so():
    said = []
    with watching(said):
        layer = nn.Linear(64, 64)
        nn.init.trunc_normal_(layer.weight, std=1 / 8, a=-3, b=3)
    found = probe(layer, torch.randn(8, 64), remarks=remarks_of(layer, said))
    assert found.layers[0].message.startswith("bounds ±3 are 24 σ: nothing is truncated")
    assert nn.init.trunc_normal_.__name__ == "trunc_normal_"


# ---- what is left alone, and what is refused


def test_the_model_the_batch_and_the_random_numbers_are_left_as_they_were():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()), torch.randn(16, 8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    probe(model, x, init="normal")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not model._forward_hooks
    assert not hasattr(x, "_bursar_signal")


def test_a_seed_gives_the_same_probe_and_another_another():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(16, 8)
    assert probe(model, x, init="kaiming", seed=1) == probe(model, x, init="kaiming", seed=1)
    assert probe(model, x, init="kaiming", seed=1) != probe(model, x, init="kaiming", seed=2)


def test_what_cannot_be_probed_is_refused_with_the_way_out():
    with pytest.raises(UnknownName, match=r"no initialiser 'kaimin'; did you mean kaiming\?"):
        probe(nn.Linear(2, 2), torch.randn(1, 2), init="kaimin")
    with torch.device("meta"):
        large, small = nn.Linear(40_000, 40_000), nn.Linear(2, 2)
    with pytest.raises(BadInput, match=r"1.6B parameters.*as in gpt2:L=2"):
        probe(large, torch.randn(1, 2), name="large")
    with pytest.raises(BadInput, match="hold no data"):
        probe(small, torch.randn(1, 2))


# ---- the command


def test_depth_is_a_number_or_a_range():
    assert parse_depths("1..64") == [1, 2, 4, 8, 16, 32, 64]
    for wrong in ("", "0", "8..4", "a..b", "1..5000"):
        with pytest.raises(BadInput, match="no depth"):
            parse_depths(wrong)


MLP = "mlp:D=64,H=64,K=8"


@pytest.mark.parametrize(
    ("scheme", "verdict"), [("normal", "exploding"), ("fan-in", "vanishing"), ("xavier", "vanishing")]
)
def test_a_deep_mlp_explodes_or_vanishes_under_the_wrong_scheme_and_not_under_kaiming(capsys, scheme, verdict):
    code, out, _ = ran(capsys, MLP, "--init", scheme, "--depth", "64", "--json")
    assert (code, json.loads(out)["verdict"]) == (1, verdict)
    code, out, _ = ran(capsys, MLP, "--init", "kaiming", "--depth", "16..64", "--json")
    points = json.loads(out)["depths"]
    assert (code, [p["depth"] for p in points]) == (0, [16, 32, 64])
    assert all(1 / 64 < p["output_second_moment"] < 64 for p in points)


def test_json_is_one_object_with_the_contracts_fields(capsys):
    code, out, err = ran(capsys, "gpt2:L=2,d=96,V=200", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["schema_version"], found["verdict"], found["before"], found["depths"]) == (1, "healthy", None, None)
    assert len(found["layers"]) == 2 + 2 * 6 + 2  # tables, two blocks, last norm and head
    names = {"name", "forward_mean", "forward_second_moment", "predicted_second_moment", "gradient_norm", "verdict"}
    assert all(names <= set(x) for x in found["layers"])
    assert all(x["agrees"] is not False for x in found["layers"])
    assert {x["verdict"] for x in found["layers"]} <= set(page.VERDICTS)


def test_what_is_not_finite_is_null_and_exploding(capsys):
    code, out, _ = ran(capsys, MLP + ",L=64", "--init", "normal", "--json")
    last = json.loads(out)["layers"][-1]
    assert (code, last["forward_second_moment"], last["verdict"]) == (1, None, "exploding")


def test_init_lays_the_models_own_rule_beside_the_new_one(capsys):
    code, out, _ = ran(capsys, MLP + ",L=12", "--init", "kaiming", "--json")
    found = json.loads(out)
    assert (code, found["scheme"], found["verdict"], found["before"]["verdict"]) == (
        0,
        "kaiming",
        "healthy",
        "vanishing",
    )
    _, out, _ = ran(capsys, MLP + ",L=12", "--init", "kaiming", "--explain")
    for part in ("before", "initialised by kaiming", "2/(n_out · d)", "█"):
        assert part in out


def test_the_page_fits_a_terminal_and_names_the_fix(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = ran(capsys, MLP, "--init", "normal")
    assert code == 1
    assert "the weights are unscaled" in out
    assert max(len(text) for text in out.splitlines()) <= 80


def test_schemes_are_listed_and_checked(capsys):
    code, out, _ = ran(capsys, "--schemes")
    assert code == 0
    for part in (*SCHEMES, "bounds ±3 are 384 σ", "output variance 512"):
        assert part in out
    found = json.loads(ran(capsys, "--schemes", "--json")[1])
    assert [s["name"] for s in found["schemes"]] == list(SCHEMES)
    assert all(c["agrees"] for c in found["checks"])


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--schemes", "cruncher"), 2, "stands alone"),
        ((), 2, "probe what?"),
        (("cruncher", "--init", "magic"), 2, "no initialiser 'magic'"),
        (("crunchy",), 2, "no model 'crunchy'"),
        (("two-layer", "--depth", "1..4"), 2, "has no number of layers L"),
        (("file.py:f", "--depth", "1..4"), 2, "--depth changes L of a preset"),
        (("cruncher", "--plot", "x.pdf"), 2, ".png or .svg"),
        (("gpt3-175b",), 2, "175B parameters"),
        (("cruncher", "--seq-len", "4"), 2, "has no sequence"),
    ],
)
def test_a_wrong_request_says_what_is_accepted(capsys, words, code, says):
    found, out, err = ran(capsys, *words)
    assert (found, out) == (code, "")
    assert says in err


def test_a_picture_needs_matplotlib_and_says_so(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.svg"):
        assert ran(capsys, "cruncher", "--plot", str(tmp_path / name))[0] == 0
        assert (tmp_path / name).stat().st_size > 1000
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'bursar\[plot\]'"):
        page.check_plot(tmp_path / "c.png")


def test_a_users_own_file_is_probed_and_its_truncation_named(capsys, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n"
        "    m = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8))\n"
        "    nn.init.trunc_normal_(m[0].weight, std=1 / 16, a=-3, b=3)\n"
        "    return m, torch.randn(32, 256)\n"
    )
    code, out, _ = ran(capsys, f"{tmp_path / 'net.py'}:net")
    assert code == 0
    assert "0: bounds ±3 are 48 σ: nothing is truncated" in out


def test_bars_are_on_a_logarithmic_axis():
    assert page._bar(10, -1, 1) == "█" * 24
    assert page._bar(1, -1, 1) == "█" * 12
    assert page._bar(0, -1, 1) == "0"
    assert page._bar(math.inf, -1, 1).endswith("not finite")


@pytest.mark.parametrize(("layer", "squared"), [(nn.ReLU(), 2.0), (nn.Tanh(), (5 / 3) ** 2), (nn.Identity(), 1.0)])
def test_kaiming_has_the_gain_of_what_follows_the_layer(layer, squared):
    model = nn.Sequential(nn.Linear(256, 512), layer, nn.Linear(512, 256))
    first = probe(model, torch.randn(64, 256), init="kaiming").layers[0]
    assert first.gain == pytest.approx(squared, rel=4 * math.sqrt(2 / (256 * 512)))  # four standard errors
