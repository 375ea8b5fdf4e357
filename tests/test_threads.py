"""One model in several threads, tasks and passes: nothing crosses."""

import asyncio
import threading

import pytest
import stress_threads
import torch
from tiny_models import build_base_model, build_model, random_hypernetwork, random_ids, random_loras

from d2l_lib.encoder import ContextEncoder, linear_inputs
from d2l_lib.engine import generate
from d2l_lib.lora import apply_lora, is_applied
from d2l_lib.model import DocToLoRA

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def adapters(model):
    return [one.scaled(30) for one in model.internalize_each(["Ada keeps 3 cats.", "Bob has a boat."])]


@torch.no_grad()
def logits(network):
    return network(input_ids=IDS, use_cache=False).logits


def in_a_thread(function, *arguments, **options):
    """What the function gives (or raises) in a thread of its own."""
    result = []

    def work():
        try:
            result.append(function(*arguments, **options))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return result[0]


class Worker:
    """A thread that was there before and does what it is told."""

    def __init__(self):
        self._todo, self._ready, self._done = [], threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            self._ready.acquire()
            self.result = self._todo.pop()()
            self._done.release()

    def __call__(self, function):
        self._todo.append(function)
        self._ready.release()
        self._done.acquire()
        return self.result


def test_threads_at_once_get_their_own_answers():
    counts = stress_threads.run(threads=3, answers=4)
    assert counts["answers"] == 12 and counts["internalized"] > 0
    assert (counts["wrong"], counts["errors"], counts["hooks"]) == (0, 0, 0)


def test_internalizing_gives_its_own_adapter_whatever_is_current():
    class Shared(DocToLoRA):
        current = property(lambda self: "another thread's", lambda self, adapter: None)

    model = build_model()
    model.__class__ = Shared
    assert model.internalize("Ada keeps 3 cats.").documents == ["document"]
    assert len(model.internalize_ids(IDS).blocks) == 1


def test_a_thread_that_was_there_before_sees_nothing_of_a_block(model, adapters):
    worker, plain = Worker(), logits(model.base_model)
    with model.applied(adapters[0]) as network:
        assert not torch.equal(logits(network), plain)
        assert torch.equal(worker(lambda: logits(network)), plain)


def test_a_thread_started_inside_a_block_sees_it_in_the_plain_model(model, adapters):
    plain = logits(model.base_model)
    with model.applied(adapters[0]) as network:
        mine = logits(network)
        assert torch.equal(in_a_thread(logits, network), mine)
        with model.applied(adapters[1]):
            assert torch.equal(in_a_thread(logits, network), logits(network))
            with model.applied(None):
                assert torch.equal(in_a_thread(logits, network), plain)
    assert torch.equal(in_a_thread(logits, model.base_model), plain)


def test_calls_of_the_model_in_another_thread_mean_its_own_adapter_or_the_current_one(model, adapters):
    ids = {"input_ids": IDS, "max_new_tokens": 6}
    by_a, by_b = (model.generate(adapter=one, **ids) for one in adapters)
    assert not torch.equal(by_a, by_b)
    model.current = adapters[1]
    try:
        with model.applied(adapters[0]):
            assert torch.equal(model.generate(**ids), by_a)
            assert torch.equal(in_a_thread(model.generate, **ids), by_b)
            assert torch.equal(in_a_thread(model.generate, adapter=adapters[0], **ids), by_a)
    finally:
        model.reset()


def test_where_blocks_of_two_threads_could_be_meant_there_is_an_error(model, adapters):
    first, second = Worker(), Worker()
    blocks = [model.applied(one) for one in adapters]
    first(blocks[0].__enter__)
    second(blocks[1].__enter__)
    try:
        error = in_a_thread(logits, model.base_model)
        assert isinstance(error, RuntimeError) and "several threads" in str(error)
        assert torch.equal(in_a_thread(model.generate, input_ids=IDS, max_new_tokens=4, adapter=None),
                           model.generate(input_ids=IDS, max_new_tokens=4, adapter=None))  # fmt: skip
    finally:
        first(lambda: blocks[0].__exit__(None, None, None))
        second(lambda: blocks[1].__exit__(None, None, None))
    assert not is_applied(model.base_model)


def test_a_streamer_reads_from_a_thread(model, adapters):
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, ids):
            self.tokens += ids.flatten().tolist()

        def end(self):
            pass

    expected = model.generate(input_ids=IDS, max_new_tokens=6, adapter=adapters[0])[0].tolist()
    streamer = Streamer()
    with model.applied(adapters[1]):
        in_a_thread(model.generate, input_ids=IDS, max_new_tokens=6, adapter=adapters[0], streamer=streamer)
    assert streamer.tokens == expected
    streamer = Streamer()
    with model.applied(adapters[0]) as network:
        in_a_thread(generate, network, model.tokenizer, IDS, max_new_tokens=6, streamer=streamer)
    assert streamer.tokens == expected


def test_tasks_have_their_own_blocks(model, adapters):
    async def ask(adapter):
        with model.applied(adapter) as network:
            await asyncio.sleep(0)  # the other task runs, and opens its block
            first = logits(network)
            await asyncio.sleep(0)
            return first

    async def both():
        return await asyncio.gather(*(ask(one) for one in adapters))

    for adapter, result in zip(adapters, asyncio.run(both()), strict=True):
        with model.applied(adapter) as network:
            assert torch.equal(result, logits(network))


@pytest.mark.parametrize("kind", ["per_layer_activations", "early_exit"])
def test_what_is_captured_comes_from_the_own_pass(kind):
    """Another thread's pass in the middle of ours leaves nothing among our states."""
    network, ids = build_base_model(), random_ids(1, 6)
    encoder, worker = ContextEncoder(network, kind), Worker()
    read = lambda: (encoder.encode(ids), linear_inputs(network, "down_proj", ids))  # noqa: E731
    expected, busy = read(), threading.local()

    def meanwhile(*_):
        if not getattr(busy, "now", False) and threading.current_thread() is not worker._thread:
            worker(lambda: network(input_ids=IDS, use_cache=False))

    hook = network.model.layers[0].register_forward_hook(meanwhile)
    try:
        for one, right in zip(read(), expected, strict=True):
            assert torch.equal(one, right)
    finally:
        hook.remove()


def test_a_block_that_is_left_in_another_context_is_closed_everywhere(model, adapters):
    plain, worker = logits(model.base_model), Worker()
    block = model.applied(adapters[0])
    block.__enter__()
    worker(lambda: block.__exit__(None, None, None))
    assert torch.equal(logits(model.base_model), plain)
    assert not any(part._forward_hooks for part in model.base_model.modules())


def test_backward_in_a_thread_of_its_own_recomputes_with_the_adapter():
    """As torch does on CUDA: recomputed activations belong to the block that is open."""
    network = build_base_model()
    loras = random_loras(random_hypernetwork(network).config, 1, 3)
    for pair in loras.values():
        for factor in pair:
            factor.requires_grad_()

    def gradients(recompute, thread):
        with apply_lora(network, loras, 1.5):
            run = lambda: network(input_ids=IDS, use_cache=False).logits.square().sum()  # noqa: E731
            loss = torch.utils.checkpoint.checkpoint(run, use_reentrant=False) if recompute else run()
            factors = [factor for pair in loras.values() for factor in pair]
            take = lambda: torch.autograd.grad(loss, factors)  # noqa: E731
            return in_a_thread(take) if thread else take()

    for one, right in zip(gradients(True, True), gradients(False, False), strict=True):
        torch.testing.assert_close(one, right)
