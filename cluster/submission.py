"""Runs on a cluster elsewhere, through the Jobs API of its dashboard; what is sent: ``cluster.sent``."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

# A stopped run finishes its step and writes a checkpoint within this; Ray's own limit is 3 s.
STOP_SECONDS = 1800
ANSWER_SECONDS = 20
# Between two bytes of what the Jobs API answers; it unpacks an upload first.
SILENCE_SECONDS = 120
# A head that has just started has no agent yet that could take a job.
AGENT_SECONDS = 60
SETTLE_SECONDS = 60
MOST_NODES = 10_000
UNREACHED = (
    requests.RequestException,
    aiohttp.ClientError,
    ConnectionError,
    RayStateApiException,
)
DIRECTORY_LINE = re.compile(r"; run directory (.+)$", re.MULTILINE)
PROGRESS_LINE = re.compile(r"^(?:step \d+/\d+|evaluation at step \d+).*$", re.MULTILINE)


class SubmissionError(Exception):
    """The cluster is out of reach, refuses, or cannot do what is asked; says what to do."""


@dataclass(frozen=True)
class Job:
    """A submitted run: ``recipe`` is its name; ``message``: a line of Ray's on its status."""

    id: str
    recipe: str
    status: JobStatus
    started: datetime | None
    ended: datetime | None
    message: str

    @property
    def finished(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status.is_terminal()

    @property
    def failed(self) -> bool:
        """Whether it ended without reaching its last step: failed, or stopped."""
        return self.finished and self.status != JobStatus.SUCCEEDED


class _Client(JobSubmissionClient):
    """Ray's, which would wait for an answer for ever."""

    def _do_request(self, *arguments: Any, **options: Any) -> requests.Response:
        return super()._do_request(*arguments, **{"timeout": SILENCE_SECONDS} | options)


class Cluster:
    """A cluster's Jobs API.

    Raises:
        SubmissionError: from every method, as one message with the remedy.
    """

    def __init__(self, address: str | None) -> None:
        """``address``: of the dashboard; default RAY_API_SERVER_ADDRESS or RAY_ADDRESS."""
        self.address = _dashboard(address)
        # What Ray uploads and ignores is its own affair.
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)
        # Ray prefers its variables to the address it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._explained():
            requests.get(f"{self.address}/api/version", timeout=ANSWER_SECONDS)
            self.client = _Client(self.address)

    def nodes(self) -> list[dict[str, float]]:
        """What each node that is up has, by Ray's names of resources."""
        with self._explained():
            nodes: Any = list_nodes(
                filters=[("state", "=", "ALIVE")], limit=MOST_NODES, timeout=ANSWER_SECONDS
            )
        return [node.resources_total for node in nodes]

    def submit(self, run: str, recipe: str, command: str, environment: dict[str, Any]) -> None:
        """Upload and start a job.

        Args:
            run: its id. recipe: the recipe's name. command: for a shell.
            environment: Ray's runtime environment; its local directories are uploaded.
        """
        deadline = time.monotonic() + AGENT_SECONDS
        with self._explained(run):
            while True:
                try:
                    self.client.submit_job(
                        entrypoint=command,
                        runtime_env=environment,
                        metadata={"recipe": recipe},
                        submission_id=run,
                    )
                    return
                except RuntimeError as error:
                    late = time.monotonic() > deadline
                    if "No available agent" not in str(error) or late:
                        raise
                    time.sleep(2)

    def job(self, run: str) -> Job:
        """A submitted run as it is now."""
        with self._explained(run):
            return _job(self.client.get_job_info(run))

    def jobs(self) -> list[Job]:
        """The runs that were submitted from here or elsewhere, newest first."""
        with self._explained():
            found = self.client.list_jobs()
        ours = [
            _job(details)
            for details in found
            if details.type == JobType.SUBMISSION and "recipe" in (details.metadata or {})
        ]
        return sorted(ours, key=lambda job: job.started or datetime.min, reverse=True)

    def logs(self, run: str) -> str:
        """All that a run has printed so far."""
        with self._explained(run):
            return self.client.get_job_logs(run)

    def follow(self, run: str, write: Callable[[str], None]) -> Job:
        """Hand on what a run prints, from its beginning, until it ends."""
        self.job(run)

        async def stream() -> None:
            async for text in self.client.tail_job_logs(run):
                write(text)

        with self._explained(run):
            asyncio.run(stream())
        return self._ended(run, SETTLE_SECONDS)

    def stop(self, run: str) -> Job:
        """End a run after its step, which saves it; returns when it has ended."""
        with self._explained(run):
            self.client.stop_job(run)
        return self._ended(run, STOP_SECONDS + SETTLE_SECONDS)

    def _ended(self, run: str, seconds: float) -> Job:
        deadline = time.monotonic() + seconds
        while not (job := self.job(run)).finished:
            if time.monotonic() > deadline:
                raise SubmissionError(f"{run} has not ended within {seconds:g} s; it goes on")
            time.sleep(0.5)
        return job

    @contextmanager
    def _explained(self, run: str = "") -> Generator[None]:
        try:
            yield
        except AuthenticationError as error:
            said = str(error).splitlines()[0]
            raise SubmissionError(
                f"{self.address} refuses: {said}. Set RAY_AUTH_MODE=token here, and the cluster's "
                "token by RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token; 'ray "
                "get-auth-token' prints it on the head"
            ) from None
        except UNREACHED as error:
            raise SubmissionError(
                f"no answer from {self.address} ({type(error).__name__}): is it the address of the "
                "head's dashboard, started with --dashboard-host=0.0.0.0, and is its port open?"
            ) from None
        except RuntimeError as error:
            raise SubmissionError(self._refusal(run, str(error))) from None

    def _refusal(self, run: str, said: str) -> str:
        if "already exists" in said:
            return f"there is a job {run} at {self.address} already; give another --id"
        if run and "status code 404" in said:
            return f"there is no job {run} at {self.address}; 'rectify list' shows what is there"
        return f"{self.address}: {said}"


def run_directory(logs: str) -> str | None:
    """Where a run writes, as it said itself."""
    found = DIRECTORY_LINE.findall(logs)
    return found[-1] if found else None


def last_metrics(logs: str) -> str | None:
    """The newest line on a step or an evaluation."""
    found = PROGRESS_LINE.findall(logs)
    return found[-1] if found else None


def _dashboard(address: str | None) -> str:
    known = (address, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    found = next(filter(None, known), None)
    remedy = "give --address http://HEAD:8265, the head's dashboard, or set RAY_API_SERVER_ADDRESS"
    if found is None:
        raise SubmissionError(f"which cluster? {remedy}")
    if not found.startswith(("http://", "https://")):
        raise SubmissionError(f"{found} is no dashboard: {remedy}")
    return found.rstrip("/")


def _job(details: JobDetails) -> Job:
    def moment(milliseconds: int | None) -> datetime | None:
        return datetime.fromtimestamp(milliseconds / 1000) if milliseconds else None

    return Job(
        id=details.submission_id or "",
        recipe=(details.metadata or {}).get("recipe", "-"),
        status=details.status,
        started=moment(details.start_time),
        ended=moment(details.end_time),
        # What follows is the end of the log.
        message=(details.message or "").partition("\n")[0].partition(", last available")[0],
    )
