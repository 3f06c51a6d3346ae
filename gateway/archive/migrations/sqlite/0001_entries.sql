-- Messages of rooms. The unique columns are the identity of a message: one that was appended again
-- in a later epoch keeps its row and has the later position.
CREATE TABLE messages (
    entry INTEGER PRIMARY KEY,
    room TEXT NOT NULL,
    epoch TEXT NOT NULL,
    -- The ordinal of the epoch.
    ordinal INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    author BLOB NOT NULL,
    id BLOB NOT NULL,
    connection BLOB NOT NULL,
    -- Bit 0: binary payload. Bit 1: no copy for the sender.
    flags INTEGER NOT NULL,
    -- `from.id`.
    sender TEXT,
    kind TEXT,
    -- Milliseconds since 1970.
    time INTEGER NOT NULL,
    -- The JSON fields of the frame, byte for byte.
    message TEXT NOT NULL,
    payload BLOB,
    -- The text that searches look at.
    text TEXT,
    bytes INTEGER NOT NULL,
    UNIQUE (room, author, id, time)
);
CREATE INDEX messages_by_seq ON messages (room, seq, ordinal, time);
CREATE INDEX messages_by_time ON messages (time);

CREATE VIRTUAL TABLE messages_text USING fts5 (
    text, content = 'messages', content_rowid = 'entry', tokenize = 'trigram'
);
CREATE TRIGGER messages_text_insert AFTER INSERT ON messages WHEN new.text IS NOT NULL BEGIN
    INSERT INTO messages_text (rowid, text) VALUES (new.entry, new.text);
END;
CREATE TRIGGER messages_text_delete AFTER DELETE ON messages WHEN old.text IS NOT NULL BEGIN
    INSERT INTO messages_text (messages_text, rowid, text) VALUES ('delete', old.entry, old.text);
END;

-- Entries of inboxes: directs and notifications.
CREATE TABLE inbox_entries (
    entry INTEGER PRIMARY KEY,
    "user" TEXT NOT NULL,
    epoch TEXT NOT NULL,
    ordinal INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    author BLOB NOT NULL,
    id BLOB NOT NULL,
    connection BLOB NOT NULL,
    flags INTEGER NOT NULL,
    sender TEXT,
    kind TEXT,
    time INTEGER NOT NULL,
    message TEXT NOT NULL,
    payload BLOB,
    -- `direct` or `notification`.
    type TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    UNIQUE ("user", author, id, time)
);
CREATE INDEX inbox_entries_by_seq ON inbox_entries ("user", seq, ordinal, time);
CREATE INDEX inbox_entries_by_time ON inbox_entries (time);

-- The highest number of a room and its latest epoch. They survive every removal of entries.
CREATE TABLE heads (
    room TEXT NOT NULL,
    kind TEXT NOT NULL,
    epoch TEXT NOT NULL,
    ordinal INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (room, kind)
) WITHOUT ROWID;

-- Deleted logs: entries of epochs below the ordinal do not come back.
CREATE TABLE deletions (
    room TEXT NOT NULL,
    kind TEXT NOT NULL,
    ordinal INTEGER NOT NULL,
    PRIMARY KEY (room, kind)
) WITHOUT ROWID;
