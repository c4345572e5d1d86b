"""One job at a time in a run folder: who is refused, who takes over, and who stops."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlp.config import ConfigError
from rlp.process import files, lock
from rlp.process.files import FolderLostError, NotWrittenError
from rlp.process.lock import RunLock, started


class Alone:
    """The only rank."""

    rank, world_size, is_first = 0, 1, True

    def gather(self, value):
        return [value]

    def broadcast(self, value):
        return value


@pytest.fixture
def make(monkeypatch):
    """Locks of this process, or of others that are made up."""
    made = []

    def make_lock(machine: str = "", **owner) -> RunLock:
        new = RunLock(Alone())
        new.owner |= {"machine": [machine, "boot", "space"], "pid": 1} if machine else {}
        new.owner |= owner
        made.append(new)
        return new

    monkeypatch.setattr(lock, "LOOK_S", 0.0)
    yield make_lock
    for one in made:
        if one._folder is not None:
            files.let_go(one._folder)


def claim(one: RunLock, folder: Path, tick=lambda: None) -> list[str]:
    said: list[str] = []
    one.claim(folder, said.append, tick)
    return said


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_a_job_that_has_let_go_is_followed_without_a_word(tmp_path, make):
    with make() as first:
        assert claim(first, tmp_path) == []
    assert claim(make(), tmp_path) == []
    assert os.listdir(tmp_path / "lock") == ["2"] and os.listdir(tmp_path / "lock" / "2") == [
        "owner.json"
    ]


def test_a_live_job_on_this_machine_is_not_disturbed(tmp_path, make, sleeper):
    """The refusal says who holds the folder and what to write, and changes nothing."""
    claim(make(pid=sleeper.pid, started=started(sleeper.pid)), tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(
        ConfigError,
        match=rf"held by process {sleeper.pid} on .*which is alive.*write run.dir=OTHER",
    ):
        claim(make(), tmp_path)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("how", ["killed", "a zombie", "its number is another's now"])
def test_a_dead_job_on_this_machine_is_followed_at_once(tmp_path, make, sleeper, how):
    """`kill -9` leaves the claim behind; a number that another process has got since is not that
    job."""
    holder = make(pid=sleeper.pid, started=started(sleeper.pid))
    claim(holder, tmp_path)
    files.let_go(tmp_path)
    if how == "its number is another's now":
        (tmp_path / "lock" / "1" / "owner.json").write_text(
            json.dumps(holder.owner | {"started": "1"})
        )
    else:
        sleeper.kill()
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | (os.WNOWAIT if how == "a zombie" else 0))
    (said,) = claim(make(), tmp_path)
    assert "takes over" in said and str(sleeper.pid) in said
    assert os.listdir(tmp_path / "lock") == ["2"]


def test_a_job_elsewhere_that_gives_signs_of_life_is_not_disturbed(tmp_path, make):
    """Found out within some heartbeats, whatever the clocks of the two machines say."""
    holder = make("node7")
    claim(holder, tmp_path)
    files.let_go(tmp_path)
    owner, looks = tmp_path / "lock" / "1" / "owner.json", []

    def tick() -> None:
        looks.append(1)
        if len(looks) == 3:
            os.utime(owner, (1.0, 1.0))  # a clock decades behind

    with pytest.raises(ConfigError, match="held by process 1 on node7"):
        claim(make(), tmp_path, tick)
    assert len(looks) == 3


@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b'{"machine": 3, "pid": {}, "id": []}', b"[" * 60_000]
)
def test_a_silent_job_elsewhere_is_followed_after_a_while(tmp_path, make, monkeypatch, content):
    """Also where what it has left of itself can not be read. It is said before the waiting and
    after."""
    monkeypatch.setattr(lock, "STALE_S", 0.2)
    claim(make("node7"), tmp_path)
    files.let_go(tmp_path)
    if content is not None:
        (tmp_path / "lock" / "1" / "owner.json").write_bytes(content)
    said = claim(make(), tmp_path)
    assert len(said) == 2 and "waiting" in said[0] and "takes over" in said[1]


def attempted_at_once(jobs: list, folder: Path) -> list:
    """What each job is answered, all of them asking in threads of their own."""
    answers: list = []
    threads = [
        threading.Thread(target=lambda job: answers.append(job._attempt(folder)), args=[job])
        for job in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_of_many_jobs_one_gets_the_folder(tmp_path, make):
    """All see that its holder is dead at the same moment, again and again."""
    dead = make(pid=2**22 + 1, started="0")
    for _ in range(5):
        shutil.rmtree(tmp_path / "lock", ignore_errors=True)
        dead.write_first(tmp_path)
        jobs = [make(f"node{index}") for index in range(8)]
        for job in jobs:
            job._is_alive = lambda owner, moved: None if owner["pid"] == 1 else False
        answers = attempted_at_once(jobs, tmp_path)
        held = [verdict for verdict, _ in answers if isinstance(verdict, tuple)]
        assert len(held) == 1 and held[0][0] == 2, answers
        assert {verdict for verdict, _ in answers if not isinstance(verdict, tuple)} <= {
            "wait",
            "again",
        }


@pytest.mark.parametrize(
    "what",
    ["renamed", "removed", "made again", "made again as a run", "taken over", "taken over twice"],
)
def test_who_no_longer_holds_the_folder_writes_nothing(tmp_path, make, monkeypatch, what):
    """Looked at before each write; a folder that was made again in its place is left as it is."""
    run = tmp_path / "run"
    run.mkdir()
    mine = make()
    claim(mine, run)
    files.write_atomically(run / "ledger.json", b"1", point="end.torn_ledger")
    if what.startswith("taken over"):
        for number in range(2, 4 if what.endswith("twice") else 3):
            (run / "lock" / str(number)).mkdir()
            (run / "lock" / str(number) / "owner.json").write_text(
                '{"machine": ["node7"], "pid": 9, "id": "other"}'
            )
            shutil.rmtree(run / "lock" / str(number - 1))
    else:
        run.rename(tmp_path / "elsewhere") if what != "removed" else shutil.rmtree(run)
    if what.startswith("made again"):
        run.mkdir()
    if what == "made again as a run":
        (run / "lock" / "1").mkdir(parents=True)
        (run / "lock" / "1" / "owner.json").write_text(
            '{"machine": ["node7"], "pid": 9, "id": "other"}'
        )
    before = sorted(path.name for path in tmp_path.rglob("*"))
    writes = [
        lambda: files.append(run / "metrics.jsonl", b"line\n", point="append.torn_line"),
        lambda: files.write_atomically(run / "ledger.json", b"2", point="end.torn_ledger"),
        lambda: files.make_folder(run / "checkpoints" / "step_1"),
        lambda: files.open_log(run / "logs" / "rank_0.log").__enter__(),
        lambda: files.set_aside(run / "checkpoints", "aside", point="save.before_aside"),
        mine.beat,
    ]
    for write in writes:
        with pytest.raises(
            FolderLostError,
            match="was taken over by" if what.startswith("taken") else "was renamed or removed",
        ):
            write()
    mine.release()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_heartbeat_moves_the_time_and_takes_no_room(tmp_path, make, monkeypatch):
    mine = make()
    claim(mine, tmp_path)
    owner = tmp_path / "lock" / "1" / "owner.json"
    os.utime(owner, (1.0, 1.0))
    mine.beat()
    moved = owner.stat().st_mtime
    assert moved > 1.0
    os.utime(owner, (1.0, 1.0))
    mine.beat()  # not yet due again
    assert owner.stat().st_mtime == 1.0
    mine._beaten = 0.0
    monkeypatch.setenv("RLP_FAULT", "lock.beat:1-:eio")
    mine.beat()


@pytest.mark.parametrize("point", ["lock.torn_owner", "lock.before_rename"])
@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_a_claim_that_can_not_be_written_is_a_sentence_and_leaves_nothing(
    tmp_path, make, monkeypatch, point, action
):
    """A resume on a full disk; on one that is mounted read-only it fails in the same place."""
    claim(make(pid=2**22 + 1, started="0"), tmp_path)
    files.let_go(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.setenv("RLP_FAULT", f"{point}:1-:{action}")
    with pytest.raises(
        NotWrittenError, match="can not be written to: .*Nothing in it was changed. Make room"
    ):
        claim(make(), tmp_path)
    assert sorted(path for path in tmp_path.rglob("*")) == before
