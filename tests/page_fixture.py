"""One page of the session's ComfyUI in one Chromium, shared by the tests that only need some page. conftest.py takes
this in as a plugin.
"""

import pytest

import browser


@pytest.fixture(scope="session")
def session_page(server):
    if reason := browser.missing():
        pytest.skip(f"no browser: {reason}")
    with browser.Page(server.url) as page:
        yield page


@pytest.fixture(scope="module")
def shared_page(session_page):
    """A browser.Page, left between the modules that ask for it. Skips, with the reason, where Chromium or its driver is
    missing.
    """
    session_page.come_back()
    yield session_page
    session_page.leave()


def unknown_nodes(page):
    """Types of nodes in the open graph and its subgraphs that the page does not know."""
    return page.js("""
        const nodes = [app.graph, ...app.graph.subgraphs.values()].flatMap(graph => graph.nodes);
        return nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types) && \
!app.graph.subgraphs.has(type));""")
