//! Removes entries by their age: whole partitions, and rows of the others.

use std::time::SystemTime;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::partitions::{self, Month};
use crate::{batch::milliseconds, sql::Scope};

/// The rows that one statement removes.
const EXPIRE_ROWS: usize = 10_000;

/// Removes entries that were accepted before `before`, and returns how many.
pub(super) async fn expire(
    connection: &mut PgConnection,
    before: SystemTime,
) -> Result<u64, sqlx::Error> {
    let before = milliseconds(before);
    let current = Month::of(before);
    let mut removed = 0;
    for scope in Scope::ALL {
        for partition in partitions_of(connection, scope).await? {
            removed += match Month::of_partition(scope, &partition) {
                Some(month) if month < current => drop_month(connection, scope, &partition).await?,
                Some(month) if month > current => 0,
                _ => delete_rows(connection, &partition, before).await?,
            };
        }
    }
    Ok(removed)
}

async fn partitions_of(
    connection: &mut PgConnection,
    scope: Scope,
) -> Result<Vec<String>, sqlx::Error> {
    let sql = "SELECT relname::text FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid \
               WHERE inhparent = to_regclass($1) ORDER BY relname";
    let names: Vec<String> =
        sqlx::query_scalar(sql).bind(scope.table()).fetch_all(connection).await?;
    let other = format!("{}_other", scope.table());
    let is_ours = |name: &String| *name == other || Month::of_partition(scope, name).is_some();
    Ok(names.into_iter().filter(is_ours).collect())
}

/// Drops a partition. It gives up after some seconds if a long query keeps the table, because all
/// other requests wait behind it.
async fn drop_month(
    connection: &mut PgConnection,
    scope: Scope,
    partition: &str,
) -> Result<u64, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    partitions::lock(&mut transaction).await?;
    let exists = sqlx::query_scalar::<_, bool>("SELECT to_regclass($1) IS NOT NULL");
    if !exists.bind(partition).fetch_one(&mut *transaction).await? {
        return Ok(0);
    }
    sqlx::query("SET LOCAL lock_timeout = '5s'").execute(&mut *transaction).await?;
    // Without this lock, rows could come between the count and the end.
    let lock = format!("LOCK TABLE {}, {partition} IN ACCESS EXCLUSIVE MODE", scope.table());
    sqlx::query(AssertSqlSafe(lock)).execute(&mut *transaction).await?;
    let count = format!("SELECT count(*) FROM {partition}");
    let count: i64 = sqlx::query_scalar(AssertSqlSafe(count)).fetch_one(&mut *transaction).await?;
    let drop = format!("DROP TABLE {partition}");
    sqlx::query(AssertSqlSafe(drop)).execute(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(u64::try_from(count).unwrap_or_default())
}

async fn delete_rows(
    connection: &mut PgConnection,
    partition: &str,
    before: i64,
) -> Result<u64, sqlx::Error> {
    let sql = format!(
        "DELETE FROM {partition} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {partition} \
         WHERE time < to_timestamp($1::bigint / 1000.0) LIMIT {EXPIRE_ROWS}))"
    );
    let mut removed = 0;
    loop {
        let query = sqlx::query(AssertSqlSafe(sql.clone())).bind(before);
        let some = query.execute(&mut *connection).await?.rows_affected();
        removed += some;
        if some == 0 {
            return Ok(removed);
        }
    }
}
