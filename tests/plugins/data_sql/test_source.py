"""Documents out of SQLite and PostgreSQL: what is read, and what is said where it cannot be."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import tracemalloc

import pytest

from apt_core.data.loading import named_sources, source_of
from apt_core.errors import ConfigError
from apt_core.kernel import boot
from apt_core.providers import Document
from apt_core.providers.dataset import DataSection
from apt_core.secrets import MASK
from apt_core.testing import TINY_PROFILE, tiny_run
from apt_plugins.data_sql.queries import fault_of
from tests.optional import optional

optional("sqlalchemy", 'needs pip install "apt-kernel[data_sql]"')

from apt_plugins.data_sql import source
from apt_plugins.data_sql.database import Database
from apt_plugins.data_sql.source import SqlSource

ORDERED = "SELECT text FROM documents ORDER BY id"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PAUSE", 0.0)
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def make(*rows, columns="id INTEGER PRIMARY KEY, text", path="corpus.db"):
    connection = sqlite3.connect(path)
    connection.execute(f"CREATE TABLE documents ({columns})")
    marks = ", ".join("?" * (columns.count(",") + 1))
    connection.executemany(f"INSERT INTO documents VALUES ({marks})", rows)
    connection.commit()
    connection.close()


def sql(query=ORDERED, url="sqlite:///corpus.db", section=None, **settings):
    provider = SqlSource({"url": url, "query": query, **settings})
    provider.data_section = DataSection.model_validate(section or {})
    return provider


def read(*args, **more):
    return list(sql(*args, **more).documents())


def problems(*args, **more):
    with pytest.raises(ConfigError) as caught:
        read(*args, **more)
    return caught.value.problems


def message(*args, **more):
    (problem,) = problems(*args, **more)
    return str(problem)


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("select text from d order by id -- the key", ""),
        ("WITH a AS (SELECT 1) SELECT text FROM d WHERE x = 'a;b' ORDER\n BY id;", ""),
        ("(SELECT text FROM d ORDER BY id)", ""),
        ("(SELECT a FROM d) UNION ALL (SELECT b FROM e) ORDER BY 1", ""),
        ("SELECT text FROM d", "no ORDER BY"),
        ("SELECT text, row_number() OVER (ORDER BY id) FROM d", "no ORDER BY"),
        ("SELECT text FROM (SELECT * FROM d ORDER BY id) AS e", "no ORDER BY"),
        ("SELECT 'ORDER BY id' FROM d /* ORDER BY id */", "no ORDER BY"),
        ('SELECT text AS "x ORDER BY y" FROM d', "no ORDER BY"),
        ("SELECT $q$ ORDER BY $q$ FROM d", "no ORDER BY"),
        ("SELECT text FROM d ORDER BY random()", "draws the order"),
        ("SELECT text FROM d ORDER BY md5(random()::text)", "draws the order"),
        ("SELECT 1 ORDER BY 1; DROP TABLE d", "more than one statement"),
        ("DELETE FROM d", "is no SELECT"),
        ("", "is no SELECT"),
    ],
)
def test_a_query_reads_and_decides_the_order_of_its_rows(query, fault):
    message, _ = fault_of(query)
    assert fault in message
    assert bool(message) == bool(fault)


def test_rows_become_documents_of_every_form():
    make(
        (1, "plain é", None, None, None, 7),
        (2, b"bytes \xc3\xa9", None, None, None, 7),
        (3, None, "2 + 2 =", "4", None, None),
        (4, None, None, None, '[{"role": "user", "content": "hi"}]', "x"),
        columns="id, body, question, answer, talk, concept",
    )
    columns = {
        **{"text": "body", "prompt": "question", "response": "answer"},
        **{"messages": "talk", "key": "concept"},
    }
    found = read("SELECT * FROM documents ORDER BY id;", section={"columns": columns})
    assert [document.parts for document in found] == [
        ("plain é",),
        ("bytes é",),
        ("2 + 2 =", "4"),
        ["hi"],
    ]
    assert [document.key for document in found] == ["7", "7", None, "x"]
    assert found[2].where == "corpus.db, row 3"


def test_what_stands_in_a_query_is_sent_as_it_is():
    make((1, "a"))
    query = "SELECT ':name %s %(x)s 100%' || text AS text FROM documents ORDER BY id"
    assert read(query) == [Document(text=":name %s %(x)s 100%a", where="corpus.db, row 1")]


def test_held_out_documents_have_a_query_of_their_own():
    make((1, "a"), (2, "b"))
    assert sql().held_out() is None
    held_out = sql(val_query="SELECT text FROM documents WHERE id > 1 ORDER BY id").held_out()
    assert [document.text for document in held_out] == ["b"]


def test_every_row_that_is_no_document_is_an_error():
    make((1, "fine"), (2, None), (3, 4), (4, b"\xff\xfe"), (5, "fine"))
    null, number, binary = problems()
    assert (null.where, null.key) == ("corpus.db, row 2", "data_sql.query")
    assert "'text' (null)" in null.message and "IS NOT NULL" in null.hint
    assert "is an int, not a string" in number.message and "CAST" in number.hint
    assert "is not UTF-8: byte 0xff at offset 0" in binary.message

    many = problems("SELECT NULL AS text FROM documents AS a, documents AS b ORDER BY 1")
    assert len(many) == 21 and "5 more rows cannot be read" in many[-1].message


def test_bytes_that_are_no_utf8_may_be_replaced_and_are_counted():
    make((1, b"a\xffb"), (2, "c"))
    with sqlite3.connect("corpus.db") as connection:  # text to SQLite, whatever it holds
        connection.execute("INSERT INTO documents VALUES (3, CAST(x'64ff' AS TEXT))")
    provider = sql(section={"errors": "replace"})
    assert [document.text for document in provider.documents()] == ["a\ufffdb", "c", "d\ufffd"]
    assert provider.replaced == 2
    assert "is not UTF-8" in problems()[0].message


def test_what_cannot_be_read_is_said_with_its_setting(tmp_path):
    make((1, "a"))
    (tmp_path / "other.db").write_text("this is no database, it is a text" * 100)
    here = {name.name for name in tmp_path.iterdir()}
    assert "data_sql.query: corpus.db refuses it: no such column: nope" in message(
        "SELECT nope FROM documents ORDER BY 1"
    )
    assert "syntax error" in message("SELECT text FROMM documents ORDER BY 1")
    assert "has no 'text'" in message("SELECT id FROM documents ORDER BY 1")
    assert "did you mean 'text'" in message("SELECT text AS texts FROM documents ORDER BY 1")
    assert "'text' twice" in message("SELECT text, text FROM documents ORDER BY 1")
    assert "corpus.db: data_sql.query: gives no rows" in message(
        "SELECT text FROM documents WHERE id > 1 ORDER BY 1"
    )
    assert "there is no file 'none.db'" in message(url="sqlite:///none.db")
    assert "is an empty database in memory" in message(url="sqlite://")
    assert "file is not a database" in message(url="sqlite:///other.db")
    assert "no dialect 'nosuch'" in message(url="nosuch://host/name")
    assert "needs a driver: No module named 'pymysql'" in message(url="mysql+pymysql://host/name")
    assert "data_sql.url: is no URL" in message(url="corpus.db")
    both = problems("SELECT 1", url="")
    assert [problem.key for problem in both] == ["data_sql.url", "data_sql.query"]
    assert {name.name for name in tmp_path.iterdir()} == here


def test_a_query_cannot_write():
    make((1, "a"))
    writes = "WITH a AS (SELECT 1) INSERT INTO documents SELECT 2, 'b' ORDER BY 1 RETURNING text"
    assert "readonly database" in message(writes)
    assert len(read()) == 1


def test_memory_does_not_grow_with_the_rows():
    make(*((number, "x" * 20_000) for number in range(2_000)))  # 40 MB
    tracemalloc.start()
    assert sum(document.num_chars for document in sql().documents()) == 40_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6


def test_documents_are_the_same_for_any_number_of_rows_at_a_time():
    make(*((number, f"{number} " * number) for number in range(60)))
    assert read(batch_rows=1) == read(batch_rows=7) == read()


def test_a_version_stands_for_the_data():
    make((1, "a"))
    assert sql().fingerprint() is None
    facts = [
        {},
        {"version": "1"},
        {"version": "2"},
        {"version": "1", "query": "SELECT text FROM documents ORDER BY id DESC"},
        {"version": "1", "section": {"errors": "replace"}},
        {"version": "1", "section": {"columns": {"text": "id"}}},
    ]
    assert len({sql(**each).fingerprint() for each in facts}) == len(facts)
    assert sql(version="1").fingerprint() == sql(version="1", batch_rows=5).fingerprint()
    places = [
        Database(f"postgresql://{user}@/db?host=/{host}&sslpassword={user}", "key").place
        for user, host in (("ann:secret", "one"), ("bob:hidden", "one"), ("ann:secret", "two"))
    ]
    assert places[0] == places[1] != places[2]
    assert sql(version="1").describe() == f"corpus.db: {ORDERED}, version 1"


def profile(**data):
    return {**TINY_PROFILE, "data": data}


def test_a_profile_names_the_source_alone_and_in_a_mixture():
    make((1, "a"), (2, "b"))
    settings = {"url": "sqlite:///corpus.db", "query": ORDERED}
    kernel = boot({**profile(loader="sql"), "data_sql": settings})
    assert "data_sql" in kernel.manager.records
    ((_, section),) = named_sources(kernel)
    assert [each.text for each in source_of(kernel, section).documents()] == ["a", "b"]

    first = {"name": "rows", "loader": "sql", "settings": settings}
    second = {"name": "docs", "source": "pydoc"}
    kernel = boot(profile(mixture=[first, second]))
    (_, rows), _ = named_sources(kernel)
    assert [each.text for each in source_of(kernel, rows).documents()] == ["a", "b"]


def test_mistakes_are_found_before_anything_is_built():
    with pytest.raises(ConfigError) as caught:
        boot({**profile(loader="sql"), "data_sql": {"query": "SELECT 1"}})
    assert [problem.key for problem in caught.value.problems] == ["data_sql.url", "data_sql.query"]

    items = [
        {"name": "a", "loader": "sql", "settings": {"url": "x", "querry": ORDERED}},
        {"name": "b", "loader": "sql", "settings": {"url": "sqlite:///a.db", "query": "DROP"}},
        {"name": "c", "loader": "text_default", "train_path": "corpus.txt"},
    ]
    with pytest.raises(ConfigError) as caught:
        boot(profile(mixture=items), plugins=["data_sql"], files=False)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["data.mixture[0].settings.querry", "data.mixture[1].settings.query"]
    assert "settings.querry: unknown key (did you mean 'query'?)" in str(caught.value)


def test_a_listing_imports_no_driver():
    code = "import sys; import apt_plugins.data_sql.plugin; print('sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# PostgreSQL -------------------------------------------------------------------------------------

ROWS = 1_000


@pytest.fixture
def table(postgres):
    postgres.execute(
        "SET lock_timeout = '5s'",
        "DROP TABLE IF EXISTS documents",
        "CREATE TABLE documents AS SELECT id, 'text ' || id AS text, "
        f"convert_to('bytes ' || id, 'UTF8') AS data FROM generate_series(1, {ROWS}) AS id",
        "CREATE SEQUENCE IF NOT EXISTS counter",
    )
    return postgres


def kill(server):
    """End the connection that reads, as an administrator would."""
    killed = server.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE state LIKE 'idle in transaction%'"
    )
    assert killed == [(True,)]


def test_postgres_is_read_by_a_cursor_of_its_own(table):
    stream = sql(url=table.url(), batch_rows=10).documents()
    assert next(stream).text == "text 1"
    # A cursor that the server keeps: its last statement fetched, and did not select.
    ((statement, state),) = table.execute(
        "SELECT query, state FROM pg_stat_activity WHERE query LIKE 'FETCH%'"
    )
    assert statement.startswith("FETCH FORWARD ") and state == "idle in transaction"
    assert len(list(stream)) == ROWS - 1
    assert table.execute("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'FETCH%'") == []
    bytes_query = "SELECT data AS text FROM documents ORDER BY id LIMIT 2"
    assert [each.text for each in read(bytes_query, url=table.url())] == ["bytes 1", "bytes 2"]


def test_postgres_is_not_written_to_and_seen_in_one_state(table):
    assert "in a read-only transaction" in message(
        "SELECT nextval('counter')::text AS text FROM documents ORDER BY id", url=table.url()
    )
    stream = sql(url=table.url(), batch_rows=10).documents()
    next(stream)
    table.execute("UPDATE documents SET text = 'changed'")
    assert {each.text[:5] for each in stream} == {"text "}


def test_a_connection_that_dies_is_made_anew_once_where_all_rows_come_again(table, caplog):
    whole = read(url=table.url())
    stream = sql(url=table.url(), batch_rows=10).documents()
    found = [next(stream) for _ in range(100)]
    kill(table)
    table.execute(f"UPDATE documents SET text = 'later' WHERE id = {ROWS}")
    with caplog.at_level(logging.WARNING):
        found += stream
    # What came before it is what the new connection sees, too: it is one state of the table.
    assert found[:-1] == whole[:-1] and found[-1].text == "later"
    (record,) = caplog.records
    assert "the connection was lost after this row" in record.message
    assert "row 1" in record.message and "terminating connection" in record.message


def test_a_connection_that_dies_where_rows_have_changed_is_an_error(table):
    for change in ("UPDATE documents SET text = 'x' WHERE id = 2", "DELETE FROM documents"):
        stream = sql(url=table.url(), batch_rows=10).documents()
        for _ in range(100):
            next(stream)
        kill(table)
        table.execute(change)
        with pytest.raises(ConfigError) as caught:
            list(stream)
        (problem,) = caught.value.problems
        assert (
            problem.where.startswith("postgresql+psycopg://admin@") and ", row 1" in problem.where
        )
        assert "was lost after this row" in problem.message and "another one" in problem.message


def test_a_connection_that_dies_twice_is_an_error_with_its_row(table):
    stream = sql(url=table.url(), batch_rows=10).documents()
    for _ in range(100):
        next(stream)
    kill(table)
    for _ in range(100):
        next(stream)
    kill(table)
    with pytest.raises(ConfigError, match=r"row [0-9]+: .*was lost.*and once more"):
        list(stream)


def test_a_server_that_is_gone_is_an_error_with_the_row(table):
    stream = sql(url=table.url(), batch_rows=10).documents()
    for _ in range(100):
        next(stream)
    table.stop()
    try:
        with pytest.raises(
            ConfigError, match=r"row 1[0-9]+: .*was lost.*there is no other"
        ) as error:
            list(stream)
        assert "sesame" not in str(error.value)
        assert "cannot connect to postgresql+psycopg://admin@" in message(url=table.url())
    finally:
        table.start()


def test_the_password_is_in_no_message_profile_or_description(table, caplog):
    for url in (table.url("nobody"), table.url().replace("sesame", "barley")):
        refused = message(url=url)
        assert "password authentication failed" in refused
        assert "sesame" not in refused and "barley" not in refused
    query = "SELECT nope FROM documents ORDER BY 1"
    assert 'column "nope" does not exist' in message(query, url=table.url())
    assert "sesame" not in sql(url=table.url()).describe()

    settings = {"url": table.url(), "query": ORDERED}
    kernel = boot({**profile(loader="sql"), "data_sql": settings})
    assert kernel.config.to_dict()["data_sql"]["url"] == MASK
    item = {"name": "rows", "loader": "sql", "settings": settings}
    # As SQLAlchemy takes it, without the escapes of a URL.
    raw = table.url().replace("o%2Fpen%20%23sesame", "o/pen#sesame")
    other = {**item, "name": "more", "settings": {**settings, "url": raw}}
    mixed = boot(profile(mixture=[item, other]))
    for text in (kernel.config.to_yaml(), mixed.config.to_yaml(), repr(kernel)):
        assert "sesame" not in text
    assert "sesame" not in caplog.text


def files_with(text, *folders):
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and text.encode() in path.read_bytes()
    ]


def test_a_run_keeps_no_password_and_resumes_with_another_one(table, tmp_path, caplog):
    settings = {"url": table.url(), "query": ORDERED, "version": "1"}
    item = {"name": "rows", "loader": "sql", "settings": settings}
    for number, data in enumerate(
        (
            {"data": {"loader": "sql", "build_workers": 1}, "data_sql": settings},
            {"data": {"mixture": [item], "build_workers": 1}},
        )
    ):
        training = {**TINY_PROFILE["training"], "lr_schedule_name": "constant"}
        whole = {**TINY_PROFILE, "training": training, **data}
        output = tmp_path / f"run{number}"
        tiny_run(profile=whole, output=output, steps=2)
        assert not files_with("sesame", output, tmp_path / "cache")
        assert files_with("postgresql+psycopg://admin@", output)
        if number == 0:
            # The store of this version is there: the database is not asked, whatever its password.
            changed = {**settings, "url": table.url().replace("sesame", "barley")}
            again = {**whole, "data_sql": changed}
            tiny_run(profile=again, output=output, steps=4, resume=True)
    assert "sesame" not in caplog.text and "barley" not in caplog.text


def test_a_store_is_not_left_half_made(table, tmp_path, monkeypatch):
    plain = source.Rows.place
    killed = []

    def place(self, line):
        if line == ROWS // 2 and not killed:
            killed.append(line)
            table.execute("DELETE FROM documents WHERE id = 1")
            kill(table)
        return plain(self, line)

    monkeypatch.setattr(source.Rows, "place", place)
    settings = {"url": table.url(), "query": ORDERED, "batch_rows": 10}
    with pytest.raises(ConfigError, match="was lost after this row"):
        tiny_run(profile={**profile(loader="sql", build_workers=1), "data_sql": settings})
    left = [path.name for path in (tmp_path / "cache" / "stores").glob("*") if path.is_dir()]
    assert left == []
