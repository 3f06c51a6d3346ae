//! The partitions of the tables of entries: one per month, and one for all other times.
//!
//! A month gets its partition with its first entry. Times before 2020 or more than a month ahead
//! come from a wrong clock or another program; their entries are in the partition `…_other`, and
//! move if their month gets a partition later.

use std::{
    collections::{BTreeSet, HashSet},
    time::SystemTime,
};

use parking_lot::Mutex;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::{
    batch::{Batch, milliseconds},
    sql::Scope,
};

/// The advisory lock of changes of partitions, the bytes of "skein_p".
const PARTITION_LOCK: i64 = 0x73_6b65_696e_5f70;
const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// A month of the calendar in UTC, counted from January of the year 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Month(i64);

impl Month {
    const FIRST: Self = Self(2020 * 12);

    /// The month of a time in milliseconds since 1970.
    pub(super) fn of(ms: i64) -> Self {
        // Days since 0000-03-01, so that a leap day is the last day of a year: see "chrono-
        // Compatible Low-Level Date Algorithms" by H. Hinnant, civil_from_days.
        let days = ms.div_euclid(DAY_MS) + 719_468;
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // March is 0.
        let month = (5 * day_of_year + 2) / 153;
        Self((era * 400 + year_of_era) * 12 + month + 2)
    }

    /// The month that a partition holds; `None` for another table.
    pub(super) fn of_partition(scope: Scope, partition: &str) -> Option<Self> {
        let name = partition.strip_prefix(scope.table())?.strip_prefix('_')?;
        let (year, month) = name.split_once('_')?;
        let (year, month): (i64, i64) = (year.parse().ok()?, month.parse().ok()?);
        let found = Self(year * 12 + month - 1);
        (found.partition(scope) == partition).then_some(found)
    }

    fn partition(self, scope: Scope) -> String {
        format!("{}_{:04}_{:02}", scope.table(), self.0 / 12, self.0 % 12 + 1)
    }

    /// The first moment, as PostgreSQL reads it.
    fn begin(self) -> String {
        format!("{:04}-{:02}-01 00:00:00+00", self.0 / 12, self.0 % 12 + 1)
    }

    fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The months that are known to have a partition.
#[derive(Default)]
pub(super) struct Months(Mutex<HashSet<(Scope, Month)>>);

impl Months {
    /// Creates the partitions of the rows of a batch.
    pub(super) async fn ensure(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
    ) -> Result<(), sqlx::Error> {
        let last = Month::of(milliseconds(SystemTime::now())).next();
        for scope in Scope::ALL {
            let months: BTreeSet<Month> =
                batch.rows(scope).map(|row| Month::of(row.time)).collect();
            for month in months.range(Month::FIRST..=last) {
                if self.0.lock().contains(&(scope, *month)) {
                    continue;
                }
                create(connection, scope, *month).await?;
                self.0.lock().insert((scope, *month));
            }
        }
        Ok(())
    }
}

/// Creates the partition of a month unless a node has done so.
async fn create(
    connection: &mut PgConnection,
    scope: Scope,
    month: Month,
) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin().await?;
    lock(&mut transaction).await?;
    let (table, partition) = (scope.table(), month.partition(scope));
    let exists = "SELECT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass($1) \
                  AND inhparent = to_regclass($2))";
    let exists = sqlx::query_scalar::<_, bool>(exists).bind(&partition).bind(table);
    if exists.fetch_one(&mut *transaction).await? {
        return transaction.commit().await;
    }
    let (begin, end) = (month.begin(), month.next().begin());
    // Entries of the month that are in the other partition would prevent the new one.
    for statement in [
        format!("LOCK TABLE {table}_other IN ACCESS EXCLUSIVE MODE"),
        format!("CREATE TABLE {partition} (LIKE {table} INCLUDING ALL)"),
        format!(
            "WITH moved AS (DELETE FROM {table}_other WHERE time >= '{begin}' AND time < '{end}' \
             RETURNING *) INSERT INTO {partition} SELECT * FROM moved"
        ),
        format!(
            "ALTER TABLE {table} ATTACH PARTITION {partition} \
             FOR VALUES FROM ('{begin}') TO ('{end}')"
        ),
    ] {
        sqlx::query(AssertSqlSafe(statement)).execute(&mut *transaction).await?;
    }
    transaction.commit().await
}

/// Waits until no other node changes partitions, and keeps them from it until the transaction ends.
pub(super) async fn lock(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(PARTITION_LOCK);
    lock.execute(connection).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(ms: i64, begin: &str, partition: &str) {
        let month = Month::of(ms);
        assert_eq!(month.begin(), begin);
        assert_eq!(month.partition(Scope::Rooms), partition);
        assert_eq!(Month::of_partition(Scope::Rooms, partition), Some(month));
    }

    #[test]
    fn a_month_has_its_partition() {
        check(0, "1970-01-01 00:00:00+00", "messages_1970_01");
        // 2024-02-29 and the moments around the end of that month.
        check(1_709_251_199_999, "2024-02-01 00:00:00+00", "messages_2024_02");
        check(1_709_251_200_000, "2024-03-01 00:00:00+00", "messages_2024_03");
        check(1_767_225_599_999, "2025-12-01 00:00:00+00", "messages_2025_12");
        check(1_767_225_600_000, "2026-01-01 00:00:00+00", "messages_2026_01");
        assert_eq!(Month::of(1_767_225_599_999).next(), Month::of(1_767_225_600_000));
        for other in
            ["messages_other", "messages_2024_13", "messages_2024_1", "inbox_entries_2024_01"]
        {
            assert_eq!(Month::of_partition(Scope::Rooms, other), None, "{other}");
        }
    }
}
