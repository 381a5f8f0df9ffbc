"""`bursar train`, one process: what is refused, the books, exact resume, checkpoints that cannot be torn."""

from __future__ import annotations

import csv
import errno
import json
import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from bursar import files, ranks
from bursar.cli import main
from bursar.errors import BadInput, NoAnswer
from bursar.train import checkpoint, config, loop, step
from bursar.workload import samples
from bursar.workload import text as texts

EXAMPLES = Path(__file__).parent.parent / "examples"
GPT = {"model": "gpt2:L=2,d=32,h=2,V=256,T=32", "data": "text.txt", "steps": 20, "batch_size": 4, "seq_len": 16,
       "lr": 1e-3, "optimizer": "adamw", "warmup_steps": 4, "clip": 1.0, "checkpoint_every": 5, "keep": 3,
       "tensorboard": False, "device": "cpu"}  # fmt: skip
CRUNCHER = {"model": "cruncher", "steps": 60, "batch_size": 8, "lr": 0.05, "tensorboard": False, "device": "cpu"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 40)
    return tmp_path


def run(folder, table, name="run", **settings):
    return loop.train(config.decode(table, folder), "run", folder / name, **settings)


def losses(folder):
    with (folder / "log.csv").open() as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


def weights(folder, table):
    """What the newest checkpoint of a run holds."""
    made = config.decode(table, folder.parent)
    trainee = step.make(made, torch.device("cpu"))
    found, manifest, _ = checkpoint.newest(folder, made)
    checkpoint.load(found, manifest, trainee)
    return trainee


# ---- the config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stpes": 3}, "no config key 'stpes'; did you mean steps?"),
        ({"steps": "many"}, "config key steps: Expected `int`, got `str`"),
        ({"batch_size": 0}, "config key batch_size: Expected `int` >= 1"),
        ({"precision": "fp8"}, "config key precision: Invalid enum value 'fp8'"),
        ({"recompute": "every-0"}, "config key recompute: none, full or every-2"),
        ({"optimizer": "adamm"}, "config key optimizer: no optimizer 'adamm'; did you mean adam"),
        ({"model": "gpt22"}, "no model 'gpt22'"),
        ({"layout": "fsdp", "optimizer": "lamb"}, "lamb changes a norm over all shards in place"),
        ({"lr": -1}, "config key lr: Expected `float` > 0"),
    ],
)
def test_a_wrong_config_names_the_key(tmp_path, change, says):
    with pytest.raises(Exception, match=says.replace("?", r"\?")) as error:
        config.decode({**GPT, **change}, tmp_path)
    assert error.value.exit_code == 2


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(BadInput, match="missing required field `steps`"):
        config.decode({"model": "cruncher", "batch_size": 1}, tmp_path)


def test_a_global_batch_is_the_micro_batches_of_all_ranks(tmp_path):
    made = config.decode({**CRUNCHER, "batch_size": 4, "global_batch_size": 16}, tmp_path)
    assert (made.micro_batches(1), made.micro_batches(2), made.micro_batches(4)) == (4, 2, 1)
    with pytest.raises(BadInput, match="batch_size 4 × 3 ranks"):
        made.micro_batches(3)


def test_the_schedule_warms_up_and_ends_at_its_share(tmp_path):
    made = config.decode({**CRUNCHER, "steps": 11, "warmup_steps": 2}, tmp_path)
    assert [made.lr_at(s, 1.0) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert made.lr_at(6, 1.0) == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine
    assert made.lr_at(10, 1.0) == pytest.approx(0.1)


def test_two_processes_and_layout_single_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "count", 2)
    with pytest.raises(BadInput, match="2 processes and layout = 'single'"):
        run(tmp_path, CRUNCHER)


# ---- the data


def test_missing_text_few_tokens_and_a_small_vocabulary_are_said(text):
    with pytest.raises(BadInput, match="no data file"):
        run(text, {**GPT, "data": "none.txt"})
    (text / "short.txt").write_text("sixteen bytes...")
    with pytest.raises(BadInput, match="gives 16 tokens; one sequence and its targets need 17"):
        run(text, {**GPT, "data": "short.txt"}, "short")
    with pytest.raises(BadInput, match=r"holds token 126 and .* knows 100: its V must be at least 127"):
        run(text, {**GPT, "model": "gpt2:L=1,d=32,h=2,V=100,T=32"}, "small")
    with pytest.raises(BadInput, match="trains on text"):
        run(text, {k: v for k, v in GPT.items() if k != "data"})


def test_targets_are_the_tokens_shifted_by_one_and_a_batch_depends_on_seed_and_step_alone(text):
    assert texts.tokenise(text / "text.txt", "bytes", 256, text) == 95 * 40
    draw = samples.from_tokens(text / "tokens.npy", 0, 16)
    x, y = draw(3, 5)
    assert x.shape == y.shape == (5, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(draw(3, 5)[0], x)
    assert not torch.equal(draw(4, 5)[0], x)


def test_a_bpe_is_trained_on_the_text_and_gives_it_back(text):
    tokenizers = pytest.importorskip("tokenizers")
    (text / "prose.txt").write_text((EXAMPLES / "text.txt").read_text()[:20_000])
    texts.tokenise(text / "prose.txt", "bpe", 400, text)
    ids = np.load(text / "tokens.npy")
    assert ids.max() < 400
    assert len(ids) < 20_000 / 2
    assert (
        tokenizers.Tokenizer.from_file(str(text / "tokenizer.json")).decode(ids.tolist())
        == (text / "prose.txt").read_text()
    )


def test_a_bpe_of_what_is_no_text_is_refused_with_the_way_out(text):
    pytest.importorskip("tokenizers")
    (text / "binary.bin").write_bytes(b"\xff\xfe\x80abc" * 100)
    with pytest.raises(BadInput, match=r"binary.bin is no UTF-8 text .*; tokenizer = 'bytes' takes any file"):
        texts.tokenise(text / "binary.bin", "bpe", 400, text)


# ---- the books


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"global_batch_size": 8},
        {"recompute": "full"},
        {"recompute": "every-2", "optimizer": "sgd"},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_traced_flops_and_peak_memory_are_the_runs_own(text, change):
    record = run(text, {**GPT, **change}, max_steps=3)
    assert record.measured.flops == record.forecast.flops
    assert record.measured.hardware_flops == record.forecast.hardware_flops
    assert record.measured.peak_bytes == pytest.approx(record.forecast.peak_bytes, rel=2e-3)
    assert record.forecast.seconds is None  # nobody knows this CPU's peak
    assert record.tokens == 3 * record.tokens_per_step


def test_in_bf16_the_cpus_library_takes_scratch_that_no_op_shows(text):
    record = run(text, {**GPT, "precision": "bf16"}, max_steps=3)
    assert record.measured.flops == record.forecast.flops
    assert record.forecast.peak_bytes <= record.measured.peak_bytes < 1.1 * record.forecast.peak_bytes


def test_the_flops_are_those_of_a_hand_count(tmp_path):
    record = run(tmp_path, {**CRUNCHER, "batch_size": 2}, max_steps=2)  # D 4, two layers and a head
    forward = 2 * 2 * (4 * 4 + 4 * 4 + 4)
    assert record.measured.flops == forward + 2 * forward - 2 * 2 * 4 * 4  # the first layer's input wants no gradient


def test_a_checkpointed_block_is_seen_by_the_meter(text):
    full, none = run(text, {**GPT, "recompute": "full"}, max_steps=3), run(text, GPT, "plain", max_steps=3)
    assert full.measured.flops == none.measured.flops
    assert full.measured.hardware_flops > none.measured.hardware_flops
    assert losses(text / "run") == losses(text / "plain")


def test_what_does_not_fit_is_refused_before_anything_is_made(text):
    with pytest.raises(NoAnswer, match="does not fit: the step needs"):
        run(text, {**GPT, "model": "gpt3-175b:V=256,L=4,d=65536,h=64", "batch_size": 1})
    assert not (text / "run").exists()


def test_the_dry_run_is_the_forecast_alone(capsys):
    main(["train", str(EXAMPLES / "cruncher.toml"), "--dry-run", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == 0
    assert record["out"] is None
    assert record["forecast"]["flops"] > 0
    assert record["measured"] == {"flops": None, "hardware_flops": None, "peak_bytes": None, "seconds": None}


def test_json_and_page_of_a_run(tmp_path, capsys):
    (tmp_path / "c.toml").write_text('model = "cruncher"\nsteps = 200\nbatch_size = 16\nlr = 0.1\ndevice = "cpu"\n')
    main(["train", str(tmp_path / "c.toml"), "--out", str(tmp_path / "a"), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert (record["steps"], record["tokens"]) == (200, 200 * 16)
    assert record["final_loss"] < record["first_loss"] / 10
    assert record["checkpoint"] == str(tmp_path / "a" / "step-00000200")
    assert record["measured"]["seconds"] > 0
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))
    main(["train", str(tmp_path / "c.toml"), "--out", str(tmp_path / "a"), "--max-steps", "5"])
    said = capsys.readouterr()
    assert f"this one goes to {tmp_path / 'a-2'}" in said.err  # a rerun starts anew
    assert "measured / forecast" in said.out
    assert losses(tmp_path / "a-2") == losses(tmp_path / "a")[:5]


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "fp16-mixed"])
def test_every_precision_learns(text, precision):
    record = run(text, {**GPT, "precision": precision, "lr": 1e-2})
    assert record.final_loss < record.first_loss - 0.3


def test_accumulated_micro_batches_are_one_batch(text):
    table = {**GPT, "optimizer": "sgd", "lr": 0.1, "clip": 100.0}
    run(text, {**table, "batch_size": 8}, "whole")
    run(text, {**table, "batch_size": 2, "accumulate": 4}, "parts")
    assert losses(text / "parts") == pytest.approx(losses(text / "whole"), rel=1e-5)


def test_the_warnings_of_a_save_are_heard_but_for_the_one_that_one_process_is_no_group():
    with warnings.catch_warnings(record=True, action="always") as heard, ranks.alone():
        warnings.warn("torch.distributed is disabled, unavailable or uninitialized, assuming …", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(w.message) for w in heard] == ["something else"]


def test_the_trainer_is_read_in_one_sitting():
    assert sum(len(path.read_text().splitlines()) for path in Path(loop.__file__).parent.glob("*.py")) <= 600


# ---- losses that are lost


def test_an_infinite_loss_stops_the_run_and_nothing_of_it_is_saved(tmp_path):
    with pytest.raises(NoAnswer, match=r"the loss of step \d+ is (inf|nan).*last good checkpoint is none"):
        run(tmp_path, {**CRUNCHER, "optimizer": "sgd", "lr": 1e12, "steps": 500, "schedule": "constant"})
    assert files.latest(tmp_path / "run") == ""


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    trainee = step.make(config.decode(CRUNCHER, tmp_path), torch.device("cpu"))
    with torch.no_grad():
        next(iter(trainee.module.parameters()))[0] = math.nan
    with pytest.raises(NoAnswer, match="a parameter is not finite"):
        checkpoint.save(tmp_path / "run", config.decode(CRUNCHER, tmp_path), trainee, 1)


def test_a_loss_that_grows_threefold_has_diverged(tmp_path, monkeypatch):
    plain = step.update

    def grows(*args, **kwargs):
        return plain(*args, **kwargs) * 0 + 1.0 + args[3]

    monkeypatch.setattr(loop, "update", grows)
    with pytest.raises(NoAnswer, match=r"diverged: the mean loss of 20 steps rose from 10.5 to"):
        run(tmp_path, CRUNCHER)


# ---- resume


@pytest.mark.parametrize(
    "change", [{}, {"precision": "fp16-mixed", "recompute": "full", "global_batch_size": 8}], ids=str
)
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(text, change):
    table = {**GPT, **change}
    straight = run(text, table, "straight")
    run(text, table, "broken", max_steps=10)
    record = run(text, table, "broken", resume=True)
    assert losses(text / "broken") == losses(text / "straight")
    assert (record.steps, record.first_loss, record.final_loss) == (20, straight.first_loss, straight.final_loss)
    a, b = (weights(text / name, table) for name in ("straight", "broken"))
    for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in a.optimizer.state[p].items():
            assert torch.equal(value, b.optimizer.state[q][key])
    assert a.scaler is None or a.scaler.state_dict() == b.scaler.state_dict()


def test_a_resume_without_the_optimizers_state_would_be_noticed(text, monkeypatch):
    run(text, GPT, "straight")
    run(text, GPT, "broken", max_steps=10)
    plain = checkpoint.set_state_dict

    def forgets(module, optimizer, **states):
        plain(module, optimizer, **states)
        optimizer.state.clear()

    monkeypatch.setattr(checkpoint, "set_state_dict", forgets)
    run(text, GPT, "broken", resume=True)
    assert losses(text / "broken")[:11] == losses(text / "straight")[:11]
    assert losses(text / "broken") != losses(text / "straight")


def test_a_changed_config_is_named_and_log_every_may_change(text):
    run(text, GPT, max_steps=5)
    with pytest.raises(BadInput, match=r"another config: lr = 0.1 \(was 0.001\); seed = 1 \(was 0\)"):
        run(text, {**GPT, "lr": 0.1, "seed": 1}, resume=True)
    assert run(text, {**GPT, "log_every": 1, "keep": 1}, max_steps=6, resume=True).steps == 6


def test_a_finished_run_resumed_has_nothing_left_to_do_and_a_log_cut_short_is_mended(text):
    first = run(text, GPT, max_steps=10)
    with (text / "run" / "log.csv").open("a") as f:
        f.write("1")  # of 10,5.4,0.001
    again = run(text, GPT, max_steps=10, resume=True)
    assert (again.steps, again.first_loss, again.final_loss) == (10, first.first_loss, first.final_loss)
    assert again.checkpoint == first.checkpoint
    assert len(losses(text / "run")) == 10


def test_resume_without_a_run_is_refused(text):
    with pytest.raises(BadInput, match="no run in"):
        run(text, GPT, "nowhere", resume=True)


# ---- checkpoints


def test_a_corrupt_checkpoint_is_passed_over_and_said_so(text):
    straight = run(text, GPT, "straight")
    run(text, GPT, max_steps=10)
    shard = next((text / "run" / "step-00000010").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    shard.write_bytes(content)
    said = []
    assert run(text, GPT, resume=True, say=said.append).final_loss == straight.final_loss
    assert "step-00000010 is corrupt" in said[0]
    assert said[0].endswith("going on from step-00000005")


def test_foreign_folders_are_no_checkpoints(text):
    (text / "run" / "step-00000003").mkdir(parents=True)
    with pytest.raises(
        BadInput,
        match=r"no good checkpoint to resume: .*step-00000003 has no manifest.json of format bursar-checkpoint-1",
    ):
        run(text, GPT, resume=True)


def test_a_whole_folder_of_another_format_is_no_checkpoint(text):
    run(text, GPT, max_steps=5)
    folder = text / "run" / "step-00000005"
    manifest = json.loads((folder / "manifest.json").read_text())
    for content in (manifest | {"format": "other-1"}, [manifest], {**manifest, "files": 3}):
        (folder / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(BadInput, match=r"no good checkpoint to resume: .*step-00000005 has no manifest.json of fo"):
            run(text, GPT, resume=True)


def test_the_newest_are_kept(text):
    run(text, {**GPT, "keep": 2})
    assert sorted(p.name for p in (text / "run").glob("step-*")) == ["step-00000015", "step-00000020"]
    assert files.latest(text / "run") == "step-00000020"


@pytest.mark.parametrize("where", ["shard", "manifest"])
def test_a_full_disk_is_an_error_and_the_old_checkpoint_stands(text, monkeypatch, where):
    run(text, GPT, max_steps=5)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "shard":
            patch.setattr(checkpoint.filesystem.FileSystemWriter, "write_data", full)
        else:
            plain = files.write
            patch.setattr(
                files, "write", lambda path, text: full() if path.name == "manifest.json" else plain(path, text)
            )
        with pytest.raises(NoAnswer, match=r"cannot save .*No space left on device; the last good .* step-00000005"):
            run(text, GPT, resume=True)
    assert not list((text / "run").glob(".saving*"))
    assert run(text, GPT, resume=True).steps == 20


def test_a_disk_that_is_full_when_losses_or_tokens_are_written_is_an_error_with_the_way_out(text, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, name in ((loop.Log, "add"), (np, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(NoAnswer, match="No space left on device; once that is mended, go on with --resume"):
                run(text, GPT, max_steps=1)


KILLER = """
    # Forks a run twenty times and kills each child with SIGKILL, every other one inside a save, which is slowed down.
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from bursar.errors import BadInput
    from bursar import files
    from bursar.train import checkpoint, config, loop
    import torch.optim, torch.distributed.checkpoint.state_dict, torch.profiler

    table, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    made, kills, inside, lost, pick = config.decode(table, folder), 0, 0, 0, random.Random(7)
    (folder / "run").mkdir()
    forecast, ahead = loop.forecast, []  # made once, here; the children have it from their birth
    loop.forecast = lambda *given: ahead[0] if ahead else ahead.append(forecast(*given)) or ahead[0]
    loop.train(made, "run", dry_run=True)

    def child(pipe):
        plain_update, plain_write = loop.update, files.write
        def update(*args, **kwargs):
            out = plain_update(*args, **kwargs)
            os.write(pipe, b"%d\\n" % (args[3] + 1))
            time.sleep(0.002)
            return out
        def write(path, text):  # the manifest, and the pointer
            save = path.name in ("manifest.json", "latest")
            os.write(pipe, b"saving\\n" * save)
            time.sleep(0.03 * save)
            plain_write(path, text)
            os.write(pipe, b"saved\\n" * save)
        loop.update, files.write = update, write
        sys.stderr = open(os.devnull, "w")
        loop.train(made, "run", folder / "run", resume=True)

    while kills < 20:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                child(write)
            finally:
                os._exit(0)
        os.close(write)
        said = os.read(read, 1)  # it has begun
        if aimed := kills % 2:
            saves = pick.randint(1, 4)  # each is twice heard of, for the manifest and for the pointer
            while said.count(b"saving") < saves and (chunk := os.read(read, 65536)):
                said += chunk
        time.sleep(pick.uniform(0.0, 0.02 if aimed else 0.25))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        while chunk := os.read(read, 65536):
            said += chunk
        os.close(read)
        words = said.split()
        steps = [int(w) for w in words if w.isdigit()]
        kills += os.WIFSIGNALED(status)
        inside += b"saving" in words[-1:]
        found, manifest, passed = checkpoint.newest(folder / "run", made)
        assert passed == [], passed
        at = manifest.get("step", 0)
        lost = max(lost, steps[-1] - at)
        if not os.WIFSIGNALED(status):
            break
    print(json.dumps({"kills": kills, "inside": inside, "lost": lost, "at": at}))
"""


def test_twenty_kills_tear_no_checkpoint_and_lose_no_more_than_the_interval(tmp_path):
    table = {**CRUNCHER, "steps": 100_000, "checkpoint_every": 10, "log_every": 1000}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), json.dumps(table), str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == 20
    assert told["inside"] >= 4
    assert told["at"] > 0
    assert told["lost"] <= 10  # a save is begun at 10, and what it saves is there when the next begins
    reached = checkpoint.newest(tmp_path / "run", config.decode(table, tmp_path))[1]["step"]
    run(tmp_path, table, "straight", max_steps=reached)
    a, b = (weights(tmp_path / name, table) for name in ("straight", "run"))
    assert all(torch.equal(p, q) for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True))


# ---- the examples


def test_the_shipped_text_is_the_generators_own():
    made = subprocess.run([sys.executable, str(EXAMPLES / "make_text.py")], capture_output=True, timeout=60, check=True)
    assert made.stdout == (EXAMPLES / "text.txt").read_bytes()


def test_the_example_gpt_learns(tmp_path):
    made = config.read(EXAMPLES / "gpt-tiny.toml")
    record = loop.train(config.decode({**GPT, "data": made.data, "lr": 1e-2}, tmp_path), "run", tmp_path / "run")
    assert record.first_loss == pytest.approx(math.log(256), abs=0.1)
    assert record.final_loss < record.first_loss - 1
