-- Messages of rooms, a partition per month. The primary key is the identity of a message: one that
-- was appended again in a later epoch keeps its row and has the later position.
CREATE TABLE messages (
    room text COLLATE "C" NOT NULL,
    epoch text COLLATE "C" NOT NULL,
    -- The ordinal of the epoch.
    ordinal bigint NOT NULL,
    seq bigint NOT NULL,
    author bytea NOT NULL,
    id uuid NOT NULL,
    connection uuid NOT NULL,
    -- Bit 0: binary payload. Bit 1: no copy for the sender.
    flags smallint NOT NULL,
    -- `from.id`.
    sender text COLLATE "C",
    kind text COLLATE "C",
    time timestamptz NOT NULL,
    -- The JSON fields of the frame, byte for byte.
    message text NOT NULL,
    payload bytea,
    -- The text that searches look at.
    text text,
    bytes integer NOT NULL,
    PRIMARY KEY (room, author, id, time)
) PARTITION BY RANGE (time);
CREATE TABLE messages_other PARTITION OF messages DEFAULT;
CREATE INDEX messages_by_seq ON messages (room, seq, ordinal, time);

-- Entries of inboxes: directs and notifications.
CREATE TABLE inbox_entries (
    "user" text COLLATE "C" NOT NULL,
    epoch text COLLATE "C" NOT NULL,
    ordinal bigint NOT NULL,
    seq bigint NOT NULL,
    author bytea NOT NULL,
    id uuid NOT NULL,
    connection uuid NOT NULL,
    flags smallint NOT NULL,
    sender text COLLATE "C",
    kind text COLLATE "C",
    time timestamptz NOT NULL,
    message text NOT NULL,
    payload bytea,
    -- `direct` or `notification`.
    type text COLLATE "C" NOT NULL,
    bytes integer NOT NULL,
    PRIMARY KEY ("user", author, id, time)
) PARTITION BY RANGE (time);
CREATE TABLE inbox_entries_other PARTITION OF inbox_entries DEFAULT;
CREATE INDEX inbox_entries_by_seq ON inbox_entries ("user", seq, ordinal, time);

-- The highest number of a room and its latest epoch. They survive every removal of entries.
CREATE TABLE heads (
    room text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    epoch text COLLATE "C" NOT NULL,
    ordinal bigint NOT NULL,
    seq bigint NOT NULL,
    PRIMARY KEY (room, kind)
);

-- Deleted logs: entries of epochs below the ordinal do not come back.
CREATE TABLE deletions (
    room text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    ordinal bigint NOT NULL,
    PRIMARY KEY (room, kind)
);
