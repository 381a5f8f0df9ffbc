"""Files that are whole or not there: a process killed at every single touch of the disk leaves no torn folder."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

EVERY_TOUCH = """
    # Seals step-2 beside step-1 in a child that dies before its n-th touch of the disk, for every n; keeps one.
    import json, os, shutil, sys
    from pathlib import Path
    from bursar import files

    place, touches, found = Path(sys.argv[1]), 0, []

    def write(folder, step):
        aside = folder / f".saving-{step}"
        files.empty(aside)
        for shard in range(3):
            (aside / f"{shard}.bin").write_bytes(bytes([step, shard]) * 100)
        files.seal(aside, folder / f"step-{step}", {"format": "f", "step": step}, 1)

    def die(event, details):
        global left
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"):
            left -= 1
            if left < 0:
                os._exit(9)

    while not found or found[-1][0]:
        folder = place / str(touches)
        folder.mkdir()
        write(folder, 1)
        pid = os.fork()
        if pid == 0:
            left = touches
            sys.addaudithook(die)
            write(folder, 2)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        path, manifest, passed = files.newest(folder, "step", "f")
        whole = path is not None and len(manifest["files"]) == 3
        for there in folder.glob("step-*"):
            files.manifest(there, "f")  # raises for one that is torn, pointed to or not
        found.append((status, manifest.get("step"), len(passed), whole))
        write(folder, 3)  # and the next save goes well
        assert files.newest(folder, "step", "f")[1]["step"] == 3
        touches += 1
    print(json.dumps(found))
"""


def test_a_kill_before_any_touch_of_the_disk_leaves_the_old_folder_or_the_new_one_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EVERY_TOUCH), str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 10
    assert [passed for _, _, passed, _ in found] == [0] * len(found)
    assert all(whole for *_, whole in found)
    steps = [step for _, step, _, _ in found]
    assert steps == sorted(steps)  # the old one up to a certain touch, and from then on the new one
    assert (steps[0], steps[-1]) == (1, 2)
