//! The chat page in a real browser: actions in one window appear in another.

use fantoccini::{Client, ClientBuilder, Locator, key::Key};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::json;

use crate::harness::{Chromedriver, Gateway, PATIENCE, Redis, get, until, within};

async fn browser(driver: &Chromedriver) -> Client {
    // As root Chromium has no sandbox; the other flags stop connections to its vendor's hosts.
    let arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        &format!("--user-data-dir={}", driver.profile.display()),
    ];
    let capabilities = json!({"goog:chromeOptions": {"args": arguments}});
    let serde_json::Value::Object(capabilities) = capabilities else { unreachable!() };
    within(ClientBuilder::new(HttpConnector::new()).capabilities(capabilities).connect(&driver.url))
        .await
        .expect("chromium is installed by `make setup`")
}

/// Opens the page in the current window, joins and waits until it is online.
async fn open_and_join(browser: &Client, url: &str, name: &str) {
    browser.goto(&format!("{url}?user={name}&name={name}&room=lobby")).await.unwrap();
    join(browser).await;
}

/// Joins in the open page and waits until it is online.
async fn join(browser: &Client) {
    let join = browser.find(Locator::Css("#join")).await.unwrap();
    join.click().await.unwrap();
    let online = Locator::Css("#status[data-state=online]");
    browser.wait().at_most(PATIENCE).for_element(online).await.unwrap();
    // The input is enabled once the room is joined.
    until("the input is enabled", async || {
        let input = browser.find(Locator::Css("#input")).await.unwrap();
        input.is_enabled().await.unwrap()
    })
    .await;
}

async fn texts(browser: &Client) -> Vec<String> {
    let mut texts = vec![];
    for content in browser.find_all(Locator::Css("#messages .message .content")).await.unwrap() {
        texts.push(content.text().await.unwrap());
    }
    texts
}

/// Waits until an element that `css` selects shows exactly `text`.
async fn wait_for_text(browser: &Client, css: &str, text: &str) {
    until(&format!("{css} shows `{text}`"), async || {
        let found = browser.find_all(Locator::Css(css)).await.unwrap();
        for element in found {
            // The page may have replaced the element meanwhile.
            if element.text().await.is_ok_and(|shown| shown == text) {
                return true;
            }
        }
        false
    })
    .await;
}

/// Waits until no element that `css` selects is displayed.
async fn wait_until_hidden(browser: &Client, css: &str) {
    until(&format!("{css} is hidden"), async || {
        for element in browser.find_all(Locator::Css(css)).await.unwrap() {
            if element.is_displayed().await.unwrap_or(true) {
                return false;
            }
        }
        true
    })
    .await;
}

/// Clicks the element that `css` selects, once it exists and is enabled.
async fn click(browser: &Client, css: &str) {
    until(&format!("{css} is clicked"), async || {
        let Ok(element) = browser.find(Locator::Css(css)).await else { return false };
        element.is_enabled().await.unwrap_or(false) && element.click().await.is_ok()
    })
    .await;
}

async fn fill(browser: &Client, css: &str, text: &str) {
    click(browser, css).await;
    browser.find(Locator::Css(css)).await.unwrap().send_keys(text).await.unwrap();
}

async fn press_enter(browser: &Client, css: &str) {
    fill(browser, css, &String::from(char::from(Key::Enter))).await;
}

/// Opens two windows and checks that a message typed in one appears in the other.
async fn check_two_pages(first: &str, second: &str) {
    let driver = Chromedriver::start().await;
    let browser = browser(&driver).await;
    let ann = browser.window().await.unwrap();
    open_and_join(&browser, first, "ann").await;
    let bob = browser.new_window(false).await.unwrap().handle;
    browser.switch_to_window(bob.clone()).await.unwrap();
    open_and_join(&browser, second, "bob").await;

    for (from, to, text) in [(&ann, &bob, "hello bob"), (&bob, &ann, "hello <b>ann</b>")] {
        browser.switch_to_window(from.clone()).await.unwrap();
        let input = browser.find(Locator::Css("#input")).await.unwrap();
        input.send_keys(text).await.unwrap();
        input.send_keys(&String::from(char::from(Key::Enter))).await.unwrap();
        for window in [to, from] {
            browser.switch_to_window(window.clone()).await.unwrap();
            until(&format!("`{text}` is shown"), async || {
                texts(&browser).await.iter().any(|shown| shown == text)
            })
            .await;
        }
    }
    assert_eq!(texts(&browser).await, ["hello bob", "hello <b>ann</b>"]);
    browser.close().await.unwrap();
}

#[tokio::test]
async fn a_message_typed_in_one_page_appears_in_another() {
    let gateway = Gateway::start(&[]).await;
    let url = format!("http://{}/", gateway.address);
    check_two_pages(&url, &url).await;
    // Browsers offer compression, and compress all messages.
    let metrics = get(gateway.admin, "/metrics").await.body;
    let count = |name: &str| -> u64 {
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    assert_eq!(
        count("gateway_deflate_handshakes_total"),
        count("gateway_handshakes_total{result=\"accepted\"}")
    );
    assert!(count("gateway_deflated_messages_total") > 0, "`connected` is large enough");
}

/// The gateway closes a browser that sends invalid compressed data with 1007.
#[tokio::test]
async fn the_page_reconnects_without_compression_once() {
    let gateway = Gateway::start(&[]).await;
    let driver = Chromedriver::start().await;
    let browser = browser(&driver).await;
    browser
        .goto(&format!("http://{}/?user=ann&name=ann&room=lobby", gateway.address))
        .await
        .unwrap();
    let keep = "window.sockets = []; const Real = WebSocket; window.WebSocket = class extends Real { \
                constructor(...all) { super(...all); sockets.push(this); } };";
    browser.execute(keep, vec![]).await.unwrap();
    join(&browser).await;
    let end = async |number: usize| {
        let end = format!("sockets[{number}].onclose({{ code: 1007, reason: 'bad_deflate' }})");
        browser.execute(&end, vec![]).await.unwrap();
    };
    let urls = async || {
        let urls = browser.execute("return sockets.map(({ url }) => url)", vec![]).await.unwrap();
        serde_json::from_value::<Vec<String>>(urls).unwrap()
    };
    end(0).await;
    until("the page is back", async || urls().await.len() == 2).await;
    let online = Locator::Css("#status[data-state=online]");
    browser.wait().at_most(PATIENCE).for_element(online).await.unwrap();
    let asked: Vec<bool> = urls().await.iter().map(|url| url.contains("deflate=off")).collect();
    assert_eq!(asked, [false, true]);
    end(1).await;
    wait_for_text(
        &browser,
        "#status",
        "The server could not read what this page sent. Reload the page.",
    )
    .await;
    assert_eq!(urls().await.len(), 2);
    browser.close().await.unwrap();
}

#[tokio::test]
async fn a_message_typed_in_one_page_appears_on_another_node() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    check_two_pages(&format!("http://{}/", one.address), &format!("http://{}/chat", two.address))
        .await;
}

#[tokio::test]
async fn presence_typing_read_marks_and_rooms_show_on_another_node() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let driver = Chromedriver::start().await;
    let browser = browser(&driver).await;
    let ann = browser.window().await.unwrap();
    open_and_join(&browser, &format!("http://{}/", one.address), "ann").await;
    let bob = browser.new_window(false).await.unwrap().handle;
    browser.switch_to_window(bob.clone()).await.unwrap();
    open_and_join(&browser, &format!("http://{}/", two.address), "bob").await;
    let to = async |window: &fantoccini::wd::WindowHandle| {
        browser.switch_to_window(window.clone()).await.unwrap();
    };

    // Present users are listed, and new ones are announced.
    wait_for_text(&browser, "#people", "ann\nbob (you)").await;
    wait_for_text(&browser, "#people-title", "2 people here").await;
    wait_for_text(&browser, "#online", "2 people online").await;
    to(&ann).await;
    wait_for_text(&browser, "#people", "ann (you)\nbob").await;

    fill(&browser, "#input", "hello").await;
    to(&bob).await;
    wait_for_text(&browser, "#typing", "ann is typing…").await;
    to(&ann).await;
    press_enter(&browser, "#input").await;
    to(&bob).await;
    wait_for_text(&browser, ".message .content", "hello").await;
    // Sending ends the typing state before it would expire after six seconds.
    let typing = browser.find(Locator::Css("#typing")).await.unwrap();
    assert_eq!(typing.text().await.unwrap(), "");
    to(&ann).await;
    wait_for_text(&browser, ".message.own .readers", "read by bob").await;

    click(&browser, "#create summary").await;
    fill(&browser, "#new-room", "den").await;
    fill(&browser, "#new-password", "secret").await;
    click(&browser, "#create-room").await;
    wait_for_text(&browser, "#title", "den").await;
    wait_for_text(&browser, "#about", "made by you, with a password").await;

    to(&bob).await;
    click(&browser, "#refresh").await;
    click(&browser, "#public-rooms [data-room=den]").await;
    wait_for_text(&browser, "#problem", "This room asks for a password.").await;
    fill(&browser, "#again-password", "guess").await;
    press_enter(&browser, "#again-password").await;
    wait_for_text(&browser, "#problem", "That is not the password of this room.").await;
    fill(&browser, "#again-password", "secret").await;
    press_enter(&browser, "#again-password").await;
    wait_for_text(&browser, "#people", "ann\nbob (you)").await;
    wait_until_hidden(&browser, "#problem, #delete").await;

    to(&ann).await;
    wait_for_text(&browser, "#people-title", "2 people here").await;
    click(&browser, "#delete").await;
    within(browser.accept_alert()).await.unwrap();
    wait_for_text(&browser, "#hint-text", "You deleted the room den.").await;
    to(&bob).await;
    wait_for_text(&browser, "#hint-text", "The room den was closed (deleted).").await;
    // The other room is still joined, and is shown.
    wait_for_text(&browser, "#rooms", "lobby").await;
    wait_for_text(&browser, "#title", "lobby").await;
    assert_eq!(texts(&browser).await, ["hello"]);
    browser.close().await.unwrap();
}

#[tokio::test]
async fn directs_show_with_unread_counts_on_another_node() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let driver = Chromedriver::start().await;
    let browser = browser(&driver).await;
    let ann = browser.window().await.unwrap();
    open_and_join(&browser, &format!("http://{}/", one.address), "ann").await;
    let bob = browser.new_window(false).await.unwrap().handle;
    browser.switch_to_window(bob.clone()).await.unwrap();
    open_and_join(&browser, &format!("http://{}/", two.address), "bob").await;
    let to = async |window: &fantoccini::wd::WindowHandle| {
        browser.switch_to_window(window.clone()).await.unwrap();
    };

    // A direct sent from a room is shown in its conversation.
    to(&ann).await;
    fill(&browser, "#input", "@bob hi").await;
    press_enter(&browser, "#input").await;
    wait_for_text(&browser, "#title", "bob").await;
    wait_for_text(&browser, ".message.own[data-state=sent] .content", "hi").await;
    wait_for_text(&browser, "#about", "online").await;

    // The receiver is notified while another room is shown, which does not show the direct.
    to(&bob).await;
    wait_for_text(&browser, "#directs [data-user=ann] .unread", "1").await;
    assert!(texts(&browser).await.is_empty());
    click(&browser, "#directs [data-user=ann]").await;
    wait_for_text(&browser, "#title", "ann").await;
    wait_for_text(&browser, ".message .content", "hi").await;
    wait_until_hidden(&browser, "#directs .unread").await;
    fill(&browser, "#input", "hi <b>ann</b>").await;
    press_enter(&browser, "#input").await;
    wait_for_text(&browser, ".message.own[data-state=sent] .content", "hi <b>ann</b>").await;

    to(&ann).await;
    wait_for_text(&browser, ".message .content", "hi <b>ann</b>").await;
    assert_eq!(texts(&browser).await, ["hi", "hi <b>ann</b>"]);
    wait_until_hidden(&browser, "#directs .unread").await;

    // After a reload the page remembers its conversations and loads their history.
    open_and_join(&browser, &format!("http://{}/", one.address), "ann").await;
    click(&browser, "#directs [data-user=bob]").await;
    until("the conversation is complete", async || {
        texts(&browser).await == ["hi", "hi <b>ann</b>"]
    })
    .await;
    browser.close().await.unwrap();
}
