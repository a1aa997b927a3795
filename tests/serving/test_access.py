"""Which requests a server answers: by the name that was asked for, and by the page that a browser says is asking."""

import pytest

pytest.importorskip("starlette", reason="the app needs gradio: pip install 'kosmos-g-diffusers[app]'")

from kosmos_g_diffusers.serving.access import Access, Refused, address_of  # noqa: E402


def scope(
    host="localhost:7860", method="GET", path="/config", server=("127.0.0.1", 7860), kind="http", **headers
):
    pairs = [] if host is None else [(b"host", host.encode())]
    pairs += [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": kind, "method": method, "path": path, "headers": pairs, "server": server}


def status(access, **request):
    try:
        access.check(scope(**request))
    except Refused as refused:
        return refused.status
    return 200


LOCAL = Access("127.0.0.1")


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:7860", "[::1]:7860", "localhost.:7860"]
)
def test_names_of_this_machine_are_answered(host, kind):
    assert status(LOCAL, host=host, kind=kind) == 200


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:7860",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "evillocalhost",
        "localhost@evil.example",
        "localhost/evil",
        "localhost:7860:1",
        "192.168.1.5",
        "0.0.0.0:7860",
        "2130706433",
        "[::2]",
        "localhost, evil.example",
        "*",
    ],
)
def test_name_of_another_is_refused(host, kind):
    assert status(LOCAL, host=host, kind=kind) == 421


def test_two_names_in_one_request_are_refused():
    request = scope()
    request["headers"].append((b"host", b"localhost:7860"))
    with pytest.raises(Refused) as caught:
        LOCAL.check(request)
    assert caught.value.status == 421


def test_name_that_a_proxy_passes_on_must_be_ours_too():
    assert status(LOCAL, x_forwarded_host="evil.example") == 421
    assert status(LOCAL, x_forwarded_host="localhost, evil.example") == 421
    assert status(Access("127.0.0.1", ["kosmos.example"]), x_forwarded_host="kosmos.example") == 200


def test_names_that_the_server_was_started_for_are_answered():
    share = []
    access = Access("192.168.1.5", ["kosmos.example", "*.lab.example"], lambda: share[0] if share else None)
    for host, expected in {
        "192.168.1.5:7860": 200,
        "kosmos.example": 200,
        "KOSMOS.example.": 200,
        "a.lab.example:1": 200,
        "lab.example": 421,
        "evil-kosmos.example": 421,
        "xyz.gradio.live": 421,
    }.items():
        assert status(access, host=host) == expected
    share.append("https://xyz.gradio.live")
    assert status(access, host="xyz.gradio.live") == 200
    for name in ("*", "a/b", "", "http://kosmos.example"):
        with pytest.raises(ValueError, match="--allowed-host"):
            Access("127.0.0.1", [name])


def test_server_of_all_addresses_answers_to_the_one_that_was_used_and_to_no_name():
    access = Access("0.0.0.0")
    assert status(access, host="192.168.1.5:7860", server=("192.168.1.5", 7860)) == 200
    assert status(access, host="192.168.1.6:7860", server=("192.168.1.5", 7860)) == 421
    assert status(access, host="evil.example:7860", server=("192.168.1.5", 7860)) == 421
    assert status(Access("::"), host="[2001:db8::5]:7860", server=("2001:db8::5", 7860)) == 200


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://evil.example:7860",
        "null",
        "file://",
        "http://localhost:9999",  # another app of this machine
        "http://localhost",
        "http://localhost:7860.evil.example",
        "http://localhost:7860@evil.example",
        "http://localhost:7860/",
        "chrome-extension://abc",
        "",
        "http://127.0.0.1:7860",  # the same app under another name
    ],
)
def test_pages_of_other_sites_are_refused(origin, method, kind):
    assert status(LOCAL, origin=origin, method=method, kind=kind) == 403


@pytest.mark.parametrize(
    ("name", "own", "other"),
    [
        ("origin", "http://localhost:7860", "http://evil.example"),
        ("sec-fetch-site", "same-origin", "cross-site"),
        ("sec-fetch-site", "same-origin", "Cross-Site"),
    ],
)
def test_own_page_does_not_stand_for_another_in_the_same_request(name, own, other):
    for values in ([other], [own, other], [other, own]):
        request = scope()
        request["headers"] += [(name.encode(), value.encode()) for value in values]
        with pytest.raises(Refused) as caught:
            LOCAL.check(request)
        assert caught.value.status == 403


def test_the_page_itself_is_served():
    assert status(LOCAL, origin="http://localhost:7860", method="POST", sec_fetch_site="same-origin") == 200
    assert status(LOCAL, method="POST") == 200  # a program
    assert status(LOCAL, sec_fetch_site="none") == 200  # typed by hand
    proxied = Access("127.0.0.1", ["kosmos.example"])
    assert status(proxied, host="kosmos.example", origin="https://kosmos.example", method="POST") == 200
    assert status(proxied, host="127.0.0.1:7860", origin="https://kosmos.example", method="POST") == 200
    assert status(proxied, host="127.0.0.1:7860", origin="https://other.example", method="POST") == 403


def test_other_sites_may_link_to_the_page_and_to_nothing_else():
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert status(LOCAL, path="/", **link) == 200
    assert status(LOCAL, path="/config", **link) == 403
    assert status(LOCAL, path="/", method="POST", **link) == 403
    assert status(LOCAL, path="/", **{**link, "sec_fetch_dest": "iframe"}) == 403
    assert status(LOCAL, path="/", **{**link, "sec_fetch_mode": "no-cors"}) == 403
    for site in ("cross-site", "same-site"):
        assert status(LOCAL, sec_fetch_site=site) == 403


def test_addresses_of_one_customer_are_one():
    def of(host):
        return address_of({"client": (host, 1)})

    assert of("192.168.1.5") == of("::ffff:192.168.1.5") != of("192.168.1.6")
    assert of("2001:db8::1") == of("2001:db8::2") != of("2001:db8:0:1::1")
    assert address_of({"client": None}) == ""
