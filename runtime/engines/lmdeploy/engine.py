"""`LMDeployBackend`: LMDeploy's engine as an `InferenceBackend`. Its loop runs in a thread of its own."""

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from attrs import evolve
from lmdeploy.messages import GenerationConfig, PytorchEngineConfig, ResponseType

from sagellm_ir.diagnostics import Diagnostic, SageIRError
from sagellm_ir.lowering.plan import PlanRequest, PlanStep
from sagellm_ir.request import Sampling
from sagellm_ir.runtime.backend import (
    EngineStats,
    EngineView,
    Finish,
    PlanSource,
    Synchronous,
    TokenEvent,
)
from sagellm_ir.runtime.engines.embedded.tokenizer import Detokenizer, ModelTokenizer
from sagellm_ir.runtime.engines.lmdeploy.clients import Client, Nothing, OneStep
from sagellm_ir.runtime.engines.lmdeploy.online import target_of
from sagellm_ir.runtime.engines.lmdeploy.scheduler import PlanDriver
from sagellm_ir.runtime.engines.lmdeploy.view import NamedSequences, Names
from sagellm_ir.runtime.planner import PlanCursor
from sagellm_ir.runtime.protocols import CapabilityDescriptor
from sagellm_ir.runtime.trace import Trace
from sagellm_ir.target import Target

__all__ = ["LMDeployBackend"]

T = TypeVar("T")


class LMDeployBackend(Synchronous):
    """One LMDeploy engine, patched. It runs nothing but inside `stream` and `step`.

    Token ids in, tokens and their text out. Use `close` or a `with` block to end it.

    Args:
        make: makes LMDeploy's `Engine`; called in the thread that runs it.
        stop_at_eos: end an answer at the model's end token; else at the planned length.
        tokenizer: the model's; None: tokens come without text.

    Raises:
        ValueError: the engine is one that plans cannot drive (see `PlanDriver`).
    """

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        stop_at_eos: bool = True,
        tokenizer: ModelTokenizer | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._stop_at_eos = stop_at_eos
        self._tokenizer = tokenizer
        self._names = Names()
        self._sessions = itertools.count()
        self._clients: dict[str, Client] = {}
        self._generated = 0
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self.engine = self._call(self._make(make))
        self._driver = self._call(self._attach())

    @classmethod
    def load(
        cls,
        path: str,
        *,
        stop_at_eos: bool = True,
        tokenizer: ModelTokenizer | None = None,
        **config: Any,
    ) -> "LMDeployBackend":
        """Load a model folder; `config` is that of LMDeploy's `PytorchEngineConfig`."""
        from lmdeploy.pytorch.engine import Engine

        settings = PytorchEngineConfig(**{"enable_prefix_caching": True, **config})
        return cls(
            lambda: Engine.from_pretrained(path, settings),
            stop_at_eos=stop_at_eos,
            tokenizer=tokenizer,
        )

    @property
    def capability(self) -> CapabilityDescriptor:
        """See `InferenceBackend`."""
        tiers = tuple(tier.name for tier in self.target.tiers)
        tp = self.engine.dist_config.tp
        return CapabilityDescriptor(
            "lmdeploy",
            device="cuda",
            dtypes=("float16", "bfloat16"),
            kv_dtypes=("fp16", "bf16"),
            tiers=tiers,
            block_size_multiple=16,
            max_tp=tp,
            mixed=False,
            supports_stop_strings=False,
        )

    @property
    def trace(self) -> Trace | None:
        """Where to note what is run; see `recording`."""
        return self._driver.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._driver.trace = trace

    @property
    def target(self) -> Target:
        """What plans for this engine are compiled for; speeds are those of the default target."""
        return target_of(self.engine)

    def submit(self, request: PlanRequest, sampling: Sampling = Sampling()) -> None:
        """Send a request to the engine, where it waits for steps.

        Raises:
            SageIRError: it has no tokens, stop strings, or the id of a request that was not released.
        """
        problem = ""
        if request.tokens is None:
            problem = "its token ids are missing"
        elif sampling.stop:
            problem = "stop strings are not supported"
        elif request.id in self._clients:
            problem = "a request of this id was not released"
        if problem:
            raise SageIRError(Diagnostic(f"request {request.id!r} cannot run: {problem}"))
        words = Detokenizer(self._tokenizer) if self._tokenizer else None
        client = Client(request, sampling, next(self._sessions), words=words)
        self._names.add(request.id, client.session)
        self._clients[request.id] = client
        asyncio.run_coroutine_threadsafe(self._read(client), self._loop)

    def stream(self, source: PlanSource) -> Iterator[TokenEvent]:
        """Run a source's steps until every request has ended.

        What the source leaves undone LMDeploy schedules by its own rules.
        """
        self._call(self._drive(source, hold=False))
        try:
            while not all(client.told for client in self._clients.values()):
                yield self._take()
        finally:
            self._call(self._drive(Nothing(), hold=True))

    def step(self, step: PlanStep) -> list[TokenEvent]:
        """Run one step; the tokens it made.

        Raises:
            SageIRError: the step cannot run.
        """
        if not step.prefill and not step.decode:
            self._call(self._move(step))
            return []
        rejected = len(self._driver.rejected)
        one = OneStep(step)
        self._call(self._drive(one, hold=True))
        while not one.ran.wait(0.01) and not self._have_ended():
            self._check_alive()  # with nothing left to do it asks no more
        made, events = self._call(self._made()), []
        while not self._events.empty() or sum(c.read for c in self._clients.values()) < made:
            events.append(self._take())
        problem = "" if one.given else "no request is waiting or running"
        if len(self._driver.rejected) > rejected:
            problem = self._driver.rejected[-1]
        if problem:
            raise SageIRError(Diagnostic(f"step {step.index} cannot run: {problem}"))
        return events

    def view(self) -> EngineView:
        """See `InferenceBackend`."""
        return self._call(self._view())

    def abort(self, request: str) -> None:
        """End a request; its rows are left out from now on."""
        self._call(self._cancel(self._clients[request]))

    def release(self, request: str) -> None:
        """Forget a request that has ended; what LMDeploy cached of it stays until room is needed."""
        client = self._clients.pop(request)
        self._call(self.engine.create_instance().async_end(client.session))
        self._names.forget(request)
        self._driver.forget(request)

    def stats(self) -> EngineStats:
        """Steps that LMDeploy scheduled by itself count too."""
        return evolve(self._driver.stats, generated=self._generated)

    def close(self) -> None:
        """End the engine and its thread."""
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "LMDeployBackend":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the engine's thread.

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _make(self, make: Callable[[], Any]) -> Any:
        engine = make()
        engine.start_loop()
        return engine

    async def _end(self) -> None:
        self.engine.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _view(self) -> EngineView:
        # Between steps LMDeploy takes in at once what was submitted.
        for client in self._clients.values():
            await self._arrival(client)
        return self._driver.view()

    async def _arrival(self, client: Client) -> None:
        """Wait until a request is in LMDeploy's scheduler, unless it was refused."""
        while not client.arrived and not client.ended:
            found = self._names.sequence(self.engine.scheduler, client.request.id)
            client.arrived = found is not None
            if not client.arrived:
                await asyncio.sleep(0.001)

    async def _attach(self) -> PlanDriver:
        requests = NamedSequences(self.engine.scheduler, self._names)
        return PlanDriver(self.engine, Nothing(), requests, hold=True)

    async def _move(self, step: PlanStep) -> None:
        self._driver.move(step)

    async def _cancel(self, client: Client) -> None:
        await self._arrival(client)  # LMDeploy forgets a stop that overtakes the request
        await self.engine.create_instance().async_cancel(client.session)

    async def _drive(self, source: PlanSource, hold: bool) -> None:
        self._driver.source, self._driver.hold = source, hold
        self._driver.overlap = isinstance(source, PlanCursor)
        self._driver.changed.set()

    def _take(self) -> TokenEvent:
        while True:
            try:
                event = self._events.get(timeout=1.0)
                break
            except queue.Empty:
                self._check_alive()
        if event.finish and event.request in self._clients:
            self._clients[event.request].told = True
        return event

    def _check_alive(self) -> None:
        task = self.engine._loop_main
        if task is not None and task.done():
            raise RuntimeError("LMDeploy's loop has ended; its log says why")

    def _have_ended(self) -> bool:
        return all(client.ended for client in self._clients.values())

    async def _made(self) -> int:
        """Tokens of all answers, read or not."""
        seqs = [self._names.sequence(self.engine.scheduler, name) for name in self._clients]
        return sum(seq.num_new_tokens for seq in seqs if seq is not None)

    async def _read(self, client: Client) -> None:
        """Turn the answer of one request into events."""
        name, tokens = client.request.id, client.request.tokens
        assert tokens is not None
        instance = self.engine.create_instance()
        answer = instance.async_stream_infer(
            client.session, list(tokens), gen_config=self._generation(client)
        )
        async for out in answer:
            ended = out.status != ResponseType.SUCCESS
            for at, token in enumerate(out.token_ids):
                last = ended and at == len(out.token_ids) - 1
                whole = client.read + 1 == client.request.max_new_tokens
                finish: Finish | None = ("length" if whole else "stop") if last else None
                text = client.text(int(token), last)
                self._events.put(TokenEvent(name, int(token), text, client.read, finish))
                client.read += 1
                self._generated += 1
            if ended:
                client.ended = True
                if not out.token_ids:
                    finish = "stop" if out.status == ResponseType.FINISH else "abort"
                    text = client.text(None, last=True)
                    self._events.put(TokenEvent(name, None, text, client.read, finish))

    def _generation(self, client: Client) -> GenerationConfig:
        sampling = client.sampling
        ends = list(self.engine.model_config.eos_token_id or []) if self._stop_at_eos else []
        return GenerationConfig(
            max_new_tokens=client.request.max_new_tokens,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or 1.0,
            top_p=sampling.top_p,
            top_k=(sampling.top_k or 0) if sampling.temperature > 0 else 1,
            random_seed=sampling.seed,
            ignore_eos=not self._stop_at_eos,
            stop_token_ids=ends,
        )
