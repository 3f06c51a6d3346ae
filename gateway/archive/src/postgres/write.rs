//! Applies a batch in one transaction.

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::{
    batch::{Batch, Head, Row},
    sql::Scope,
};

/// The advisory lock of entries and deletions, the bytes of "skein_d": transactions with entries
/// share it, and those with deletions have it alone.
const DELETION_LOCK: i64 = 0x73_6b65_696e_5f64;
/// The rows of one insert.
const INSERT_ROWS: usize = 500;

pub(super) async fn apply(connection: &mut PgConnection, batch: &Batch) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let lock = if batch.deletions.is_empty() {
        "SELECT pg_advisory_xact_lock_shared($1)"
    } else {
        "SELECT pg_advisory_xact_lock($1)"
    };
    sqlx::query(lock).bind(DELETION_LOCK).execute(&mut *transaction).await?;
    delete(&mut transaction, batch).await?;
    for scope in Scope::ALL {
        for rows in batch.statements(scope, INSERT_ROWS) {
            insert(&mut transaction, scope, &rows).await?;
        }
    }
    update_heads(&mut transaction, batch).await?;
    transaction.commit().await
}

async fn delete(connection: &mut PgConnection, batch: &Batch) -> Result<(), sqlx::Error> {
    for ((scope, name), ordinal) in &batch.deletions {
        let query = sqlx::query(
            "INSERT INTO deletions AS old (room, kind, ordinal) VALUES ($1, $2, $3) \
             ON CONFLICT (room, kind) DO UPDATE \
             SET ordinal = greatest(old.ordinal, excluded.ordinal)",
        );
        query.bind(name).bind(scope.kind()).bind(ordinal).execute(&mut *connection).await?;
        let (table, column) = (scope.table(), scope.name());
        let sql = format!("DELETE FROM {table} WHERE {column} = $1 AND ordinal < $2");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(name).bind(ordinal);
        query.execute(&mut *connection).await?;
    }
    Ok(())
}

async fn insert(
    connection: &mut PgConnection,
    scope: Scope,
    rows: &[&Row],
) -> Result<(), sqlx::Error> {
    fn each<'a, T>(rows: &[&'a Row], value: impl Fn(&'a Row) -> T) -> Vec<T> {
        rows.iter().map(|row| value(row)).collect()
    }
    sqlx::query(AssertSqlSafe(insert_sql(scope)))
        .bind(each(rows, |row| row.name.as_str()))
        .bind(each(rows, |row| row.epoch.as_str()))
        .bind(each(rows, |row| row.ordinal))
        .bind(each(rows, |row| row.seq))
        .bind(each(rows, |row| row.author.as_slice()))
        .bind(each(rows, |row| row.id))
        .bind(each(rows, |row| row.connection))
        .bind(each(rows, |row| row.flags))
        .bind(each(rows, |row| row.sender.as_deref()))
        .bind(each(rows, |row| row.kind.as_deref()))
        .bind(each(rows, |row| row.time))
        .bind(each(rows, |row| row.message.as_str()))
        .bind(each(rows, |row| row.payload.as_deref()))
        .bind(each(rows, |row| row.extra.as_deref()))
        .bind(each(rows, |row| row.bytes))
        .bind(scope.kind())
        .execute(connection)
        .await?;
    Ok(())
}

/// The insert of the rows of arrays, of which those stay out that were deleted before.
fn insert_sql(scope: Scope) -> String {
    let (table, name, extra, columns) =
        (scope.table(), scope.name(), scope.extra(), scope.columns());
    format!(
        "INSERT INTO {table} AS old ({columns}) \
         SELECT {name}, epoch, ordinal, seq, author, id, connection, flags, sender, kind, \
         to_timestamp(time / 1000.0), message, payload, {extra}, bytes FROM unnest($1::text[], \
         $2::text[], $3::bigint[], $4::bigint[], $5::bytea[], $6::uuid[], $7::uuid[], \
         $8::bigint[], $9::text[], $10::text[], $11::bigint[], $12::text[], $13::bytea[], \
         $14::text[], $15::integer[]) AS new({columns}) WHERE NOT EXISTS (SELECT FROM deletions \
         WHERE deletions.kind = $16 AND deletions.room = new.{name} \
         AND deletions.ordinal > new.ordinal) \
         ON CONFLICT ({name}, author, id, time) DO UPDATE SET epoch = excluded.epoch, \
         ordinal = excluded.ordinal, seq = excluded.seq WHERE excluded.ordinal > old.ordinal"
    )
}

async fn update_heads(connection: &mut PgConnection, batch: &Batch) -> Result<(), sqlx::Error> {
    let heads: Vec<(&str, &str, &Head)> =
        batch.heads.iter().map(|((scope, name), head)| (&**name, scope.kind(), head)).collect();
    let query = sqlx::query(
        "INSERT INTO heads AS old (room, kind, epoch, ordinal, seq) \
         SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[]) \
         ON CONFLICT (room, kind) DO UPDATE SET seq = greatest(old.seq, excluded.seq), \
         epoch = CASE WHEN excluded.ordinal > old.ordinal THEN excluded.epoch ELSE old.epoch END, \
         ordinal = greatest(old.ordinal, excluded.ordinal) \
         WHERE excluded.seq > old.seq OR excluded.ordinal > old.ordinal",
    );
    query
        .bind(heads.iter().map(|(name, ..)| *name).collect::<Vec<_>>())
        .bind(heads.iter().map(|(_, kind, _)| *kind).collect::<Vec<_>>())
        .bind(heads.iter().map(|(.., head)| head.epoch.as_str()).collect::<Vec<_>>())
        .bind(heads.iter().map(|(.., head)| head.ordinal).collect::<Vec<_>>())
        .bind(heads.iter().map(|(.., head)| head.seq).collect::<Vec<_>>())
        .execute(connection)
        .await?;
    Ok(())
}
