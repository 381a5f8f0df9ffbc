import subprocess
import sys
from dataclasses import replace

import pytest

from bursar.architecture import Network, Transformer, from_hf_config, known_models, parse_preset, preset
from bursar.errors import BadInput, UnknownName

LLAMA_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
GPT2_CONFIG = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "vocab_size": 100,
    "n_positions": 128,
    "n_inner": None,
}
BERT_BASE_CONFIG = {
    "model_type": "bert",
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}


def transformer(name: str) -> Transformer:
    shape = preset(name)
    assert isinstance(shape, Transformer)
    return shape


# ---- parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # what the published weights hold
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        # the course's answers
        ("course-gpt2-xl", 2_127_057_600),
        ("course-gpt2-xl-f4288", 1_640_452_800),
        ("course-gpt2-xl-2mat", 1_635_537_600),
        # the notes'
        ("cruncher", 4 * 4 * 2 + 4),
        ("two-layer", 512 * 512 + 512 * 10),
        ("resnet50", 25_557_032),
    ],
)
def test_a_preset_has_exactly_the_parameters_of_the_model_it_names(name, parameters):
    assert preset(name).parameters() == parameters


@pytest.mark.parametrize(
    ("name", "millions"),  # Brown et al. 2020, table D.1
    [
        ("gpt3-125m", 125),
        ("gpt3-350m", 356),
        ("gpt3-760m", 760),
        ("gpt3-1.3b", 1_320),
        ("gpt3-2.7b", 2_650),
        ("gpt3-6.7b", 6_660),
        ("gpt3-13b", 12_850),
        ("gpt3-175b", 174_600),
    ],
)
def test_gpt3_shapes_come_to_the_parameters_the_paper_prints(name, millions):
    assert preset(name).parameters() == pytest.approx(millions * 1e6, rel=0.004)


def test_gpt2_parameters_by_hand():
    d, f, layers = 768, 3072, 12
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    assert transformer("gpt2").parameters() == 50257 * d + 1024 * d + layers * block + 2 * d


def test_the_blocks_of_gpt3_are_twelve_d_squared_per_layer():
    groups = transformer("gpt3-175b").parameter_groups()
    biases = 96 * (3 * 12288 + 12288 + 49152 + 12288)
    assert groups["attention"] + groups["mlp"] - biases == 12 * 12288**2 * 96  # 173.95e9, the notes' rule


def test_parameter_groups_add_up_to_the_whole():
    for name in known_models():
        shape = preset(name)
        if isinstance(shape, Transformer):
            assert sum(shape.parameter_groups().values()) == shape.parameters()


def test_grouped_queries_save_parameters_in_keys_and_values_only():
    grouped = transformer("llama3-8b")
    full = replace(grouped, n_kv_heads=grouped.n_heads)
    difference = {k: v - grouped.parameter_groups()[k] for k, v in full.parameter_groups().items()}
    saved = 32 * 2 * 4096 * (32 - 8) * 128
    assert difference == {"embedding": 0, "position": 0, "attention": saved, "mlp": 0, "norm": 0, "head": 0}


# ---- the catalogue


def test_every_row_has_a_source_and_heads_that_multiply_to_the_width():
    for name in known_models():
        shape = preset(name)
        assert shape.name == name
        assert len(shape.source) > 20
        if isinstance(shape, Transformer):
            assert shape.n_heads * shape.head_dim == shape.d_model


def test_where_the_gpt3_paper_misprints_the_row_says_so():
    assert "24 heads" in preset("gpt3-1.3b").source
    assert "5140" in preset("gpt3-13b").source


def test_an_unknown_model_is_an_error_that_knows_the_names():
    with pytest.raises(UnknownName, match="llama3-8b") as error:
        preset("llama3-8B ")
    assert error.value.known == known_models()


def test_shapes_are_read_without_torch():
    code = "import sys; from bursar.architecture import preset; preset('gpt2'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- sizes after the name


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("gpt2", ("gpt2", {})),
        ("two-layer:D=512,K=10", ("two-layer", {"D": 512, "K": 10})),
        ("two-layer:d=512,b=4", ("two-layer", {"D": 512, "B": 4})),
        ("cruncher:B=2, D=4, L=3", ("cruncher", {"B": 2, "D": 4, "L": 3})),
        ("mlp:B=1,D=2,H=3,L=4,K=5", ("mlp", {"B": 1, "D": 2, "H": 3, "L": 4, "K": 5})),
        (
            "llama3-8b:L=2,D=64,H=4,kv=2,F=96,V=100,T=32",
            ("llama3-8b", {"L": 2, "d": 64, "h": 4, "kv": 2, "F": 96, "V": 100, "T": 32}),
        ),
    ],
)
def test_sizes_after_a_presets_name_are_read_in_either_spelling(text, parsed):
    assert parse_preset(text) == parsed


@pytest.mark.parametrize(
    "text", ["gpt2:Q=1", "two-layer:H=4", "cruncher:K=1", "gpt2:=1", "gpt2:layers=3", "gpt2:KvV=3"]
)
def test_an_unknown_size_is_an_error_that_lists_the_known(text):
    with pytest.raises(UnknownName) as error:
        parse_preset(text)
    assert error.value.known in (("L", "d", "h", "kv", "F", "V", "T"), ("B", "D", "K"), ("B", "D", "L"))


@pytest.mark.parametrize(
    "text",
    ["gpt2:L=0", "gpt2:L=-1", "gpt2:L=two", "gpt2:L=1.5", "gpt2:L=", "gpt2:L", "gpt2:", "gpt2:L=1,", "gpt2:d=8,D=8"],
)
def test_a_size_that_cannot_be_meant_is_refused(text):
    with pytest.raises(BadInput, match="gpt2"):
        parse_preset(text)


def test_a_size_set_from_python_is_held_to_the_same_rules():
    assert preset("gpt2", L=2) == preset("gpt2:L=2")
    with pytest.raises(BadInput, match="whole number"):
        preset("gpt2", L=True)
    with pytest.raises(BadInput, match="twice"):
        preset("gpt2:L=2", L=3)


def test_what_a_transformer_is_not_told_follows_what_it_is_told():
    shape = transformer("gpt2:d=256,h=4")
    assert (shape.head_dim, shape.n_kv_heads, shape.d_ff) == (64, 4, 1024)
    shape = transformer("llama3-8b:d=256,h=8")
    assert (shape.head_dim, shape.n_kv_heads, shape.d_ff) == (32, 8, 14336)
    assert transformer("gpt2:d=256,h=4,F=100").d_ff == 100
    assert shape.name == "llama3-8b:d=256,h=8"


def test_sizes_of_a_network_replace_the_defaults():
    shape = preset("two-layer:D=8")
    assert isinstance(shape, Network)
    assert dict(shape.sizes) == {"B": 64, "D": 8, "K": 10}
    assert shape.parameters() == 8 * 8 + 8 * 10


@pytest.mark.parametrize("text", ["gpt2:d=100", "gpt2:h=7", "gpt2:kv=4", "llama3-8b:kv=5", "llama3-8b:d=96,h=32,kv=32"])
def test_a_shape_no_model_can_have_is_refused(text):
    with pytest.raises(BadInput):
        preset(text)


# ---- config.json


def test_a_llama_config_gives_its_shape():
    shape = from_hf_config(LLAMA_CONFIG)
    expected = replace(
        transformer("llama3-8b:L=2,d=64,h=4,kv=2,F=96,V=100,T=128"),
        name="llama",
        norm_eps=1e-6,
        source="config.json of model_type llama",
    )
    assert shape == expected


def test_a_gpt2_config_without_an_inner_width_has_four_times_the_width():
    shape = from_hf_config(GPT2_CONFIG, name="mine")
    expected = replace(
        transformer("gpt2:L=2,d=64,h=4,V=100,T=128"), name="mine", source="config.json of model_type gpt2"
    )
    assert shape == expected
    assert from_hf_config({**GPT2_CONFIG, "n_inner": 96}).d_ff == 96


def test_bert_base_has_the_parameters_of_its_masked_language_model():
    d, f = 768, 3072
    embeddings = (30522 + 512 + 2) * d + 2 * d
    block = 4 * (d * d + d) + 2 * d + (d * f + f) + (f * d + d) + 2 * d
    head = (d * d + d) + 2 * d + 30522  # the decoder's matrix is the embedding's
    assert from_hf_config(BERT_BASE_CONFIG).parameters() == embeddings + 12 * block + head == 109_514_298


def test_optional_keys_of_a_config_are_honoured():
    assert from_hf_config({**LLAMA_CONFIG, "num_key_value_heads": None}).n_kv_heads == 4
    assert from_hf_config({**LLAMA_CONFIG, "head_dim": 32}).head_dim == 32
    assert from_hf_config({**LLAMA_CONFIG, "rope_parameters": {"rope_theta": 7.0}}).rope_theta == 7.0
    tied = from_hf_config({**LLAMA_CONFIG, "tie_word_embeddings": True})
    assert from_hf_config(LLAMA_CONFIG).parameters() - tied.parameters() == 100 * 64
    biased = from_hf_config({**LLAMA_CONFIG, "attention_bias": True, "mlp_bias": True})
    assert biased.parameters() - from_hf_config(LLAMA_CONFIG).parameters() == 2 * (64 + 2 * 32 + 64 + 96 + 96 + 64)


def test_each_key_a_config_needs_is_named_when_it_is_missing():
    optional = {
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "n_inner",
        "type_vocab_size",
    }
    for config in (LLAMA_CONFIG, GPT2_CONFIG, BERT_BASE_CONFIG):
        for key in config.keys() - optional:
            with pytest.raises(BadInput, match=f"'{key}'"):
                from_hf_config({k: v for k, v in config.items() if k != key})


@pytest.mark.parametrize("value", ["64", 64.0, 0, -64, True, [64], {}])
def test_a_malformed_value_in_a_config_is_named(value):
    with pytest.raises(BadInput, match="'hidden_size'"):
        from_hf_config({**LLAMA_CONFIG, "hidden_size": value})


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": "yes"},
        {"rms_norm_eps": "small"},
        {"rope_theta": -1},
        {"rope_parameters": {"rope_theta": "x"}},
        {"attention_bias": 1},
        {"attention_bias": True},
    ],
)
def test_a_malformed_optional_value_is_named_too(change):
    key = next(iter(change))
    with pytest.raises(BadInput, match=f"'{key}"):
        from_hf_config({**LLAMA_CONFIG, **change})


def test_a_config_that_would_be_miscounted_is_refused():
    with pytest.raises(BadInput, match="add_cross_attention"):
        from_hf_config({**GPT2_CONFIG, "add_cross_attention": True})
    with pytest.raises(BadInput, match="position_embedding_type"):
        from_hf_config({**BERT_BASE_CONFIG, "position_embedding_type": "relative_key"})


def test_a_model_type_bursar_does_not_read_is_an_error_that_lists_those_it_does():
    with pytest.raises(UnknownName) as error:
        from_hf_config({"model_type": "mamba"})
    assert error.value.known == ("gpt2", "llama", "bert")
    with pytest.raises(BadInput, match="object"):
        from_hf_config([])  # type: ignore[arg-type]
