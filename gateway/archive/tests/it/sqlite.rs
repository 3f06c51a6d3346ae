//! Properties of the archive in SQLite alone.

use skein_archive::{OpenError, open};

use crate::{
    deployment::{Deployment, options},
    samples::{message, records, seqs},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_opened_again_with_its_entries() {
    let on = Deployment::sqlite().await;
    on.apply(records((1..=3).map(message))).await;
    let again = on.again().await;
    let range = skein_core::bus::ReadRange::Newest { limit: 9 };
    let page = again.read("r".parse().unwrap(), range, Default::default()).await.unwrap();
    assert_eq!(seqs(&page).0, [1, 2, 3]);
    assert_eq!(on.number("SELECT count(*) FROM pragma_integrity_check").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_opened_is_named() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("text");
    std::fs::write(&file, "this is not a database, and long enough to look like none").unwrap();
    let url = |path: &std::path::Path| format!("sqlite://{}", path.display()).into();
    let error = open(&url(&file), options()).await.map(drop).unwrap_err();
    assert!(matches!(error, OpenError::Sqlite { .. }), "{error}");
    assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
    let error = open(&url(&file.join("below")), options()).await.map(drop).unwrap_err();
    assert!(matches!(error, OpenError::Folder { .. }), "{error}");
}
