"""Run Snakemake for a build or a sweep, one at a time, and show a person what runs, what is done and how long is left."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nsm_book import BookError, site, store
from nsm_book.fingerprint import differences, discard_damaged, forget_dates, record
from nsm_book.run import DISK_FULL, DONE, NOTE, disk_errors_in_words
from nsm_book.schema import BUILD, ROOT, Page, claims, pages, parameters, profile_parameters

RULE = re.compile(r"(?:local)?rule (\w+):$")
FINISHED = re.compile(r"Finished jobid: \d+ \(Rule: (\w+)\)")
FAILED = re.compile(r"\w*Error in rule (\w+)")
COUNT = re.compile(r"(\w+) +(\d+)$")
STEP_SECONDS = {"site": 20.0, "results": 1.0}  # expected, of the steps that are no pages
UNEXPLAINED = "its process or job ended without a word: killed, or out of time, memory or disk"


@contextlib.contextmanager
def only_build(console: Console) -> Iterator[TextIO]:
    """Hold the checkout's one build lock and yield its file; a second build waits, naming the first.

    Snakemake inherits the open file, so the lock is free only when the build and its Snakemake have both ended, however.
    """
    with disk_errors_in_words():
        BUILD.mkdir(exist_ok=True)
        lock = (BUILD / "build.lock").open("a+")
    with lock, disk_errors_in_words():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            console.print(
                f"{holder}, or the Snakemake that it began, is building in this checkout; waiting for it to end", highlight=False
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} (started {time.strftime('%H:%M:%S')})\n")
        lock.flush()
        yield lock


def rule_name(page: Page) -> str:
    return f"page_{re.sub(r'[^A-Za-z0-9]', '_', page.name)}"


@dataclass
class Progression:
    """How far Snakemake is, from what it prints: the steps of its plan, those that run and since when, those that ended."""

    profile: str
    expected: dict[str, float]  # seconds of each rule
    width: dict[str, float]  # share of all cores that each rule keeps busy
    planned: dict[str, int] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    in_plan: bool = False

    def read(self, line: str) -> None:
        if line.startswith("Job stats:"):
            self.in_plan = True
        elif self.in_plan and (match := COUNT.match(line)):
            self.planned |= {match[1]: int(match[2])} if match[1] not in ("book", "sweep", "total") else {}
        elif self.in_plan and not line.strip():
            self.in_plan = False
        elif (match := RULE.match(line)) and match[1] in self.planned:
            self.running.setdefault(match[1], time.monotonic())
        elif match := FINISHED.match(line):
            self._end(match[1], self.ended)
        elif match := FAILED.match(line):
            self._end(match[1], self.failed)

    def _end(self, rule: str, where: list[str]) -> None:
        if rule in self.planned:
            self.running.pop(rule, None)
            where.append(rule)

    def steps(self, pages_only: bool) -> int:
        """How many steps the plan has; of a sweep's only the pages count, beside its runs."""
        return sum(count for rule, count in self.planned.items() if not pages_only or rule.startswith("page_"))

    def seconds_left(self) -> float:
        """What the rest will take if every step takes as long as expected."""
        over, now = {*self.ended, *self.failed}, time.monotonic()
        rest = {rule: self.expected.get(rule, 0.0) for rule in self.planned if rule not in over}
        rest |= {rule: max(0.0, rest.get(rule, 0.0) - now + began) for rule, began in self.running.items()}
        return sum(seconds * self.width.get(rule, 1.0) for rule, seconds in rest.items())


class RunCount:
    """How many runs of a sweep have ended, and how long the rest will take at the same pace."""

    def __init__(self, total: int):
        self.total, self.done, self.began = total, 0, time.monotonic()

    def seconds_left(self) -> float:
        return (time.monotonic() - self.began) / self.done * (self.total - self.done) if self.done else 0.0


def new_lines(process: subprocess.Popen, log: Path) -> Iterator[str]:
    """The lines of Snakemake's log as they come, an empty one where there is none yet, until it has ended.

    A file and no pipe: a page that outlives its Snakemake can still write to it, and keeps nobody waiting.
    """
    with log.open(errors="replace") as file:
        started = ""
        while True:
            ended = process.poll() is not None
            while text := file.readline():
                started += text
                if started.endswith("\n"):
                    yield started
                    started = ""
            if ended:
                return
            yield ""
            time.sleep(0.1)


def watch(process: subprocess.Popen, log: Path, progression: Progression, console: Console, runs: RunCount | None) -> None:
    """Show what is meant for a person, and how long is left, until Snakemake ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    began, shown, waiting = time.monotonic(), 0, list[str]()

    def seconds_left() -> float:
        return progression.seconds_left() + (runs.seconds_left() if runs else 0.0)

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=1.0, left="")
        for line in new_lines(process, log):
            progression.read(line.rstrip("\n"))
            if line.startswith(NOTE):
                console.print(line[len(NOTE) :].rstrip(), highlight=False, markup=False)
            if line.startswith(DONE):
                waiting.append(line[len(DONE) :].rstrip())
                if runs and waiting[-1].partition(":")[0] not in pages():
                    runs.done += 1
            while waiting and (runs or FINISHED.match(line)):  # until a page counts as done, it is among what is left
                shown += 1
                total = progression.steps(bool(runs)) + (runs.total if runs else 0)
                left = f"   (about {seconds_left():.0f} s left)" if seconds_left() >= 1 else ""
                console.print(f"[{shown}/{total}] {waiting.pop(0)}{left}", highlight=False, markup=False)
            names = ", ".join(f"{rule} {time.monotonic() - at:.0f} s" for rule, at in progression.running.items())
            gone, left_now = time.monotonic() - began, seconds_left()
            progress.update(
                bar, completed=gone / ((gone + left_now) or 1.0), description=names, left=f"about {left_now:.0f} s left"
            )


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl+C does: with all that it began."""

    def end(signum, frame):
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def memory_of_machine() -> list[str]:
    """What this machine has for steps that run on it, besides cores, as Snakemake wants it."""
    return ["--resources", f"mem_mb={psutil.virtual_memory().total // 2**20}"]


def snakemake(
    words: list[str],
    stale: list[Page],
    progression: Progression,
    console: Console,
    lock: TextIO,
    log: Path,
    runs: RunCount | None = None,
) -> int:
    """Let Snakemake bring its targets up to date while a person watches; return its exit code.

    The caller's lock stands for Snakemake's own, which a killed build would leave behind. The stale pages are forced to run
    also where Snakemake has lost its notes of their last run.
    """
    forget_dates(progression.profile)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)  # what outlived an earlier Snakemake goes on writing to that one's
    command = [sys.executable, "-m", "snakemake", "--keep-going", "--nolock", "--rerun-incomplete", "--scheduler", "greedy"]
    command += ["--rerun-triggers", "params", "input", "--max-checksum-file-size", str(2**40), *words]  # no date decides
    command += ["--forcerun", *map(rule_name, stale)] if stale else []
    with log.open("w") as out, ended_in_order():
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
        try:
            watch(process, log, progression, console, runs)
        except BaseException:
            steps = psutil.Process(process.pid).children(recursive=True)
            for sign in (signal.SIGINT, signal.SIGTERM):  # a job that was begun in the background ignores the first
                process.send_signal(sign)
            for step in steps:
                with contextlib.suppress(psutil.NoSuchProcess):
                    step.terminate()
            process.wait()
            raise
    return process.wait()


def why_it_ended(code: int, log: Path, reasons: list[str]) -> list[str]:
    """What there is to add to the reasons that the steps gave themselves, once Snakemake has ended with this code."""
    again = "give the same command again: what had ended before is kept"
    if code < 0:
        return [f"Snakemake was killed by signal {-code}: {again}"]
    tail = log.read_text(errors="replace")[-4000:]
    if shutil.disk_usage(BUILD).free < 2**20 or any(os.strerror(number) in "\n".join([*reasons, tail]) for number in DISK_FULL):
        return [f"no room was left for a file below {BUILD}. Make room and {again}"]
    return [] if reasons else [tail]


def failure(path: Path, name: str) -> str:
    """Why the run that should have become `path` failed, as it wrote it down itself."""
    reasons = path.with_suffix(".failed.txt")
    return reasons.read_text().strip() if reasons.exists() else f"{name}: {UNEXPLAINED}"


def expectation(profile: str, cores: int) -> Progression:
    """The seconds that each page took the last time, or may take, and the share of the cores that it keeps busy."""
    seconds, width = dict(STEP_SECONDS), {}
    for page in pages().values():
        seconds[rule_name(page)] = record(page.run_file(profile)).get("seconds", page.budget[profile])
        width[rule_name(page)] = min(cores, page.cores) / cores
    return Progression(profile, seconds, width)


def remove_leftovers(profile: str) -> None:
    """Remove the runs of pages that are gone, and what failed runs left."""
    kept = {page.run_file(profile) for page in pages().values()}
    for left in (BUILD / "runs" / profile).rglob("*"):
        if left.is_file() and left not in kept and not any(part.startswith(".") for part in left.parts[-2:]):
            left.unlink(missing_ok=True)


def build(profile: str, cores: int, console: Console) -> Path:
    """Run what is not up to date, publish if everything may be published, and return the site's folder.

    Raises:
        BookError: with each page that failed, its cell and its traceback. The site stays as it was.
    """
    claims()  # whatever can be refused is refused now, before anything runs
    for page in pages().values():
        parameters(page), profile_parameters(page, profile)
    store.catalogue(profile)
    with only_build(console) as lock:
        remove_leftovers(profile)
        progression = expectation(profile, cores)
        discard_damaged(profile)
        store.discard_damaged(profile)
        site.discard_damaged(profile)
        log = BUILD / "log" / f"{profile}.txt"
        words = ["--cores", str(cores), *memory_of_machine(), "--config", f"profile={profile}"]
        stale = [page for page in pages().values() if differences(page, profile)]
        if count := sum(not page.reads_results for page in stale):
            total = sum(not page.reads_results for page in pages().values())
            console.print(f"{count} of {total} pages to run, on {cores} cores", highlight=False)
        code = snakemake(words, stale, progression, console, lock, log)
        if code:
            by_rule = {rule_name(page): page for page in pages().values()}
            ended = dict.fromkeys([*progression.failed, *(progression.running if code > 0 else ())])
            reasons = [failure(by_rule[rule].run_file(profile), by_rule[rule].name) for rule in ended if rule in by_rule]
            reasons += [failure(site.card_file(profile), rule) for rule in ended if rule not in by_rule]
            text = "\n\n".join([*reasons, *why_it_ended(code, log, reasons)])
            raise BookError(f"{text}\n\nThe site was left as it was. Snakemake's own log: {log}")
        return site.switch(profile)
