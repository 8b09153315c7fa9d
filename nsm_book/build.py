"""Run Snakemake for a build or a sweep: one at a time, steps side by side, with progress and the time left."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nsm_book import ROOT, BookError, collect, execute, stage, swept
from nsm_book.fingerprint import record, stale_pages
from nsm_book.schema import BUILD, claims, pages, parameters, profile_parameters

SITE_SECONDS = 20.0  # what rendering is expected to take before it was ever measured


@contextlib.contextmanager
def only_build(console: Console):
    """Hold the checkout's one build lock and yield its file; a second build waits, naming the first.

    Snakemake inherits the open file, so the lock is free only when the build and its Snakemake have both ended, however.
    """
    with execute.disk_errors_told():
        BUILD.mkdir(exist_ok=True)
        lock = (BUILD / "build.lock").open("a+")
    with lock, execute.disk_errors_told():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            console.print(
                f"{holder}, or the Snakemake that it began, is building in this checkout; waiting for it to end", highlight=False
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        with (BUILD / "steps.lock").open("a") as steps:  # held by every step that is still alive
            try:
                fcntl.flock(steps, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                console.print("a page or run outlived the build or sweep that was killed; waiting for it to end", highlight=False)
                fcntl.flock(steps, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} (started {time.strftime('%H:%M:%S')})\n")
        lock.flush()
        yield lock


@contextlib.contextmanager
def step_lock():
    """Show that a step is alive: a build that follows a killed one waits for it."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "steps.lock").open("a+") as alive:  # a shared lock on NFS asks for a file that can be read
        fcntl.flock(alive, fcntl.LOCK_SH)
        yield


def note_state(profile: str, what: str, state: str, message: str = "", seconds: float = 0.0) -> None:
    """Tell the build that watches how far one page, one run of a sweep, or the site is."""
    path = BUILD / "status" / profile / f"{what.replace('/', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"what": what, "state": state, "message": message, "seconds": seconds, "at": time.time()}))
    os.replace(new, path)


def told(profile: str, what: str, work: Callable[[], str]) -> str:
    """Do one piece of work, tell the build that watches how it went, and return the line that says what was done."""
    began = time.perf_counter()
    try:
        with execute.disk_errors_told():
            note_state(profile, what, "running")
            message = work()
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a full disk only Snakemake's log may hold the reason
            note_state(profile, what, "failed", str(error) if isinstance(error, BookError) else f"{what}: {error!r}")
        raise
    note_state(profile, what, "done", message, time.perf_counter() - began)
    return message


def read_states(profile: str, known: dict[str, dict] | None = None) -> dict[str, dict]:
    """How far everything is, by name; what did not change since `known` is not read again."""
    by_file = {entry["file"]: entry for entry in (known or {}).values()}
    found = {}
    folder = BUILD / "status" / profile
    for file in os.scandir(folder) if folder.exists() else ():
        if file.name.endswith(".json"):
            key = (file.name, file.stat().st_mtime_ns)
            entry = by_file.get(key) or {**json.loads(Path(file.path).read_text()), "file": key}
            found[entry["what"]] = entry
    return found


def seconds_left(expected: dict[str, float], states: dict[str, dict], cores: int, runs_at_once: int = 1) -> tuple[float, float]:
    """Which share of the work is done, and how many seconds the rest will take on so many cores.

    A run of a sweep, named `PAGE ID`, is expected to take as long as those of its sweep that have ended, beside others.
    """
    took = [entry["seconds"] for what, entry in states.items() if " " in what and entry["state"] == "done"]
    mean = sum(took) / len(took) if took else None
    expect = {what: mean if mean is not None and " " in what else seconds for what, seconds in expected.items()}
    running = {what: time.time() - entry["at"] for what, entry in states.items() if entry["state"] == "running"}
    waiting = sum(" " in what and (what not in states or what in running) for what in expect)
    done = rest = 0.0
    for what, seconds in expect.items():
        gone = seconds if what in states and what not in running else min(seconds, running.get(what, 0.0))
        if " " in what:
            wide = 1 / max(1, min(runs_at_once, waiting))
        else:
            wide = 1.0 if what == "site" else min(cores, pages()[what].cores) / cores
        done, rest = done + gone, rest + (seconds - gone) * wide
    return done / (sum(expect.values()) or 1.0), rest


def watch(
    process: subprocess.Popen, profile: str, expected: dict[str, float], cores: int, console: Console, runs_at_once: int
) -> None:
    """Show what runs, what is done and how long is left, until the process ends."""
    said, states = set(), {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("book", total=1.0, left="")
        while True:
            ended, states = process.poll() is not None, read_states(profile, states)
            share, left = seconds_left(expected, states, cores, runs_at_once)
            for what, entry in states.items():
                if entry["state"] != "running" and what not in said:
                    said.add(what)
                    count = f"[{len(said & expected.keys())}/{len(expected)}] " if what in expected else ""
                    text = entry["message"] if entry["state"] == "done" else f"{what}: FAILED"
                    rest = f"   (about {left:.0f} s left)" if what in expected and left > 0 else ""
                    console.print(f"{count}{text}{rest}", highlight=False, markup=False)
            names = ", ".join(
                f"{what} {time.time() - entry['at']:.0f} s" for what, entry in states.items() if entry["state"] == "running"
            )
            progress.update(bar, completed=share, description=names or "starting", left=f"about {left:.0f} s left")
            if ended:
                return
            time.sleep(max(0.1, len(expected) / 2000))  # looking at all steps takes time too


@contextlib.contextmanager
def ended_in_order():
    """Let SIGTERM end this process as Ctrl+C does: with all that it began."""

    def end(signum, frame):
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def room() -> list[str]:
    """What this machine has for steps that run on it, besides cores, as Snakemake is told it."""
    return ["--resources", f"mem_mb={psutil.virtual_memory().total // 2**20}"]


def snakemake(
    words: list[str],
    profile: str,
    expected: dict[str, float],
    cores: int,
    console: Console,
    *,
    lock,
    log: Path,
    runs_at_once: int = 1,
) -> int:
    """Let Snakemake bring its targets up to date while a person watches; return its exit code.

    The caller's lock stands for Snakemake's own, which a killed build would leave behind. Snakemake's checksums, taken when a
    step ends, would hide what changed while it ran; fingerprints tell better what a page depends on.
    """
    shutil.rmtree(BUILD / "status" / profile, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--keep-going",
        "--nolock",
        "--rerun-incomplete",
        "--rerun-triggers",
        "mtime",
        "--max-checksum-file-size",
        "0",
        "--scheduler",
        "greedy",
        *words,
    ]
    with log.open("w") as out, ended_in_order():
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
        try:
            watch(process, profile, expected, cores, console, runs_at_once)
        except BaseException:
            steps = psutil.Process(process.pid).children(recursive=True)
            for sign in (signal.SIGINT, signal.SIGTERM):  # a job that was begun in the background ignores the first
                process.send_signal(sign)
            for step in steps:
                with contextlib.suppress(psutil.NoSuchProcess):
                    step.terminate()
            process.wait()
            raise
    return process.returncode


def failures(code: int, states: dict[str, dict]) -> dict[str, str]:
    """Why each step failed, by name. A step at work when Snakemake ends by itself was killed, or had no room to say more."""
    failed = {what: entry["message"] for what, entry in states.items() if entry["state"] == "failed"}
    killed = [what for what, entry in states.items() if entry["state"] == "running" and code >= 0]
    return failed | {
        what: f"{what}: its process or job ended without a word: killed, or out of time, memory or disk" for what in killed
    }


def last_words(code: int, log: Path, told: list[str]) -> list[str]:
    """What there is to add to what the steps told of themselves, once Snakemake has ended with this code."""
    again = "give the same command again: what had ended before is kept"
    if code < 0:
        return [f"Snakemake was killed by signal {-code}: {again}"]
    text = "\n".join(told) or log.read_text()[-4000:]
    if shutil.disk_usage(BUILD).free < 2**20 or any(os.strerror(number) in text for number in execute.NO_ROOM):
        return [f"no room was left for a file below {BUILD}. Make room and {again}"]
    return [] if told else [text]


def known_seconds(profile: str) -> dict[str, float]:
    """What each page, and the site, took the last time; nothing, if that cannot be read."""
    try:
        return dict(json.loads((BUILD / "seconds" / f"{profile}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def build(profile: str, cores: int, console: Console) -> Path:
    """Run what is not up to date, publish if everything may be published, and return the site's folder.

    Raises:
        BookError: with each page that failed, its cell and its traceback. The site stays as it was.
    """
    # Whatever can be refused is refused now, before anything runs.
    claims()
    for entry in pages().values():
        parameters(entry)
        profile_parameters(entry, profile)
    swept.read_all()
    with only_build(console) as lock:
        execute.clean_leftovers(profile)
        todo, known = stale_pages(profile), known_seconds(profile)
        expected = {entry.name: known.get(entry.name, entry.budget[profile]) for entry in todo}
        if todo:
            expected["site"] = known.get("site", SITE_SECONDS)
            console.print(f"{len(todo)} of {len(pages())} pages to run, on {cores} cores", highlight=False)
        log = BUILD / "log" / f"{profile}.txt"
        code = snakemake(
            ["--cores", str(cores), *room(), "--config", f"profile={profile}"],
            profile,
            expected,
            cores,
            console,
            lock=lock,
            log=log,
        )
        states = read_states(profile)
        failed = list(failures(code, states).values())
        if states.get("site", {}).get("state") == "done":
            known["site"] = states["site"]["seconds"]
        for entry in pages().values():
            known[entry.name] = record(entry.run_file(profile)).get("seconds", known.get(entry.name, entry.budget[profile]))
        if code:
            shown = "\n\n".join([*failed, *last_words(code, log, failed)])
            raise BookError(f"{shown}\n\nThe site was left as it was. Snakemake's own log: {log}")
        with collect.whole(BUILD / "seconds" / f"{profile}.json") as path:
            path.write_text(json.dumps(known))
        return stage.switch(profile)
