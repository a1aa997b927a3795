"""Turns and shares of the queue, and what becomes of runs that nobody waits for."""

import threading
import time

import pytest

from kosmos_g_diffusers.serving import queue
from kosmos_g_diffusers.serving.queue import Caller, QueueFull, Worker


@pytest.fixture
def gate():
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def busy(gate):
    """A worker that draws for somebody else until the gate opens."""
    worker, started = Worker(capacity=8), threading.Event()

    def hold(ticket):
        started.set()
        while not gate.wait(0.01):
            ticket.check()

    worker.submit(hold)
    started.wait()
    yield worker
    gate.set()
    worker.close()


def fill(worker, order, *callers):
    """Submit a run for each; they write the session of theirs into `order`."""
    return [worker.submit(lambda ticket: order.append(ticket.caller.session), caller) for caller in callers]


def test_session_may_have_two_waiting_and_others_still_get_in(busy):
    greedy = Caller("greedy", "1.1.1.1")
    fill(busy, [], greedy, greedy)
    with pytest.raises(QueueFull, match="full for you: 2 of your runs are waiting"):
        busy.submit(print, greedy)
    busy.submit(print, Caller("other", "2.2.2.2"))


def test_address_has_a_share_however_many_sessions_it_opens(busy):
    fill(busy, [], *(Caller(f"s{number}", "1.1.1.1") for number in range(6)))
    with pytest.raises(QueueFull, match="full for your address: 6 runs"):
        busy.submit(print, Caller("s7", "1.1.1.1"))
    fill(busy, [], Caller("a", "2.2.2.2"), Caller("b", "3.3.3.3"))
    with pytest.raises(QueueFull, match="The queue is full: 8 runs are waiting"):
        busy.submit(print, Caller("c", "4.4.4.4"))


def test_message_counts_those_that_wait_besides_the_one_about_to_begin(gate):
    worker, greedy = Worker(capacity=8), Caller("greedy", "1.1.1.1")
    with worker._condition:  # the thread cannot look at the queue meanwhile
        fill(worker, [], greedy, greedy, greedy)
        with pytest.raises(QueueFull, match="full for you: 2 of your runs are waiting"):
            worker.submit(print, greedy)
    worker.close()


def test_places_are_kept_for_sessions_of_an_address_without_a_turn(busy, gate):
    """Clients of one address, more than it has places: who just had a turn cannot take the last places from the others."""
    address = [Caller(f"s{number}", "1.1.1.1") for number in range(10)]
    hold, started = threading.Event(), threading.Event()
    first = fill(busy, [], *address[:4])
    gate.set()
    assert all(ticket.ended.wait(10) for ticket in first)

    def block(ticket):
        started.set()
        hold.wait(10)

    busy.submit(block)
    assert started.wait(10)
    fill(busy, [], *address[4:8])  # 4 of the 6 places of the address
    with pytest.raises(QueueFull, match="full for your address: 4 runs"):
        busy.submit(print, address[0])  # had a turn
    fill(busy, [], *address[8:10])  # had none
    busy.submit(print, Caller("other", "2.2.2.2"))
    hold.set()


def test_runs_that_nobody_listens_for_take_no_place_from_others_of_their_address(busy):
    for number in range(6):
        busy.submit(print, Caller(f"deaf{number}", "1.1.1.1", lambda: False))
    with pytest.raises(QueueFull):
        busy.submit(print, Caller("deaf", "1.1.1.1", lambda: False))
    assert busy.submit(print, Caller("honest", "1.1.1.1")).place


def test_sessions_take_turns_and_tickets_tell_their_places(busy, gate):
    order = []
    a, b, c = (Caller(name, "1.1.1.1") for name in "abc")
    tickets = fill(busy, order, a, a, b, c, b)
    assert [ticket.place for ticket in tickets] == [1, 4, 2, 3, 5]
    gate.set()
    assert all(ticket.ended.wait(10) for ticket in tickets)
    assert order == ["a", "b", "c", "a", "b"]


def test_addresses_take_turns_before_their_sessions_do(busy, gate):
    order = []
    tickets = fill(busy, order, *(Caller(name, "1.1.1.1") for name in "abcd"), Caller("z", "2.2.2.2"))
    gate.set()
    assert all(ticket.ended.wait(10) for ticket in tickets)
    assert order.index("z") == 1


def test_new_session_for_each_run_comes_not_before_those_who_waited(busy, gate):
    order = []
    tickets = fill(busy, order, Caller("old", "1.1.1.1"))
    gate.set()
    assert tickets[0].ended.wait(10)
    hold, started = threading.Event(), threading.Event()

    def block(ticket):
        started.set()
        hold.wait(10)

    busy.submit(block, Caller("x", "1.1.1.1"))
    started.wait()
    tickets = fill(busy, order, Caller("old", "1.1.1.1"), *(Caller(f"new{n}", "1.1.1.1") for n in range(3)))
    hold.set()
    assert all(ticket.ended.wait(10) for ticket in tickets)
    assert order == ["old", "old", "new0", "new1", "new2"]


def test_run_begins_only_while_somebody_listens(monkeypatch):
    monkeypatch.setattr(queue, "LISTENER_COMES", 0.5)
    worker, there = Worker(capacity=4), threading.Event()
    drawn = []
    deaf = worker.submit(lambda ticket: drawn.append("deaf"), Caller("a", "1", lambda: False))
    later = worker.submit(lambda ticket: drawn.append("later"), Caller("b", "1", there.is_set))
    heard = worker.submit(lambda ticket: drawn.append("heard"), Caller("c", "1"))
    assert heard.ended.wait(10) and drawn == ["heard"]  # what nobody listens for is not waited for
    there.set()
    assert later.ended.wait(10) and drawn == ["heard", "later"]
    assert deaf.ended.wait(10) and deaf.state == "cancelled" and "deaf" not in drawn
    worker.close()


def test_run_that_is_left_in_the_middle_ends(monkeypatch):
    monkeypatch.setattr(queue, "LISTENER_BACK", 0.2)
    worker, there, started = Worker(capacity=4), threading.Event(), threading.Event()
    there.set()

    def draw(ticket):
        started.set()
        while True:
            ticket.check()
            time.sleep(0.01)

    ticket = worker.submit(draw, Caller("a", "1", there.is_set))
    assert started.wait(10)
    there.clear()
    assert ticket.ended.wait(10) and ticket.state == "cancelled"
    worker.close()


def test_runs_that_nobody_listens_for_take_no_place_from_others(busy):
    for number in range(8):
        busy.submit(print, Caller(f"s{number}", f"1.1.1.{number}", lambda: False))
    with pytest.raises(QueueFull):
        busy.submit(print, Caller("s9", "1.1.1.9", lambda: False))
    assert busy.submit(print, Caller("honest", "2.2.2.2")).place


def test_servers_own_jobs_have_no_limit_and_come_first(busy, gate):
    order = []
    tickets = fill(busy, order, Caller("a", "1.1.1.1"))
    tickets.append(busy.submit(lambda ticket: order.append("own")))
    gate.set()
    assert all(ticket.ended.wait(10) for ticket in tickets) and order == ["own", "a"]
