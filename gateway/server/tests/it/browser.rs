//! The chat page in a real browser: what is done in one window shows in another.

use fantoccini::{Client, ClientBuilder, Locator, key::Key};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::json;

use crate::harness::{Chromedriver, Gateway, PATIENCE, Redis, get, until, within};

async fn browser(driver: &Chromedriver) -> Client {
    // As root Chromium has no sandbox; without the rest it looks for hosts of its maker.
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

/// Opens the page in the present window, joins and waits until it is online.
async fn enter(browser: &Client, url: &str, name: &str) {
    browser.goto(&format!("{url}?user={name}&name={name}&room=lobby")).await.unwrap();
    join(browser).await;
}

/// Joins in the page that is open and waits until it is online.
async fn join(browser: &Client) {
    let join = browser.find(Locator::Css("#join")).await.unwrap();
    join.click().await.unwrap();
    let online = Locator::Css("#status[data-state=online]");
    browser.wait().at_most(PATIENCE).for_element(online).await.unwrap();
    // The input takes text when the room is joined.
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
async fn shows(browser: &Client, css: &str, text: &str) {
    until(&format!("{css} shows `{text}`"), async || {
        let found = browser.find_all(Locator::Css(css)).await.unwrap();
        for element in found {
            // The page may have drawn it anew meanwhile.
            if element.text().await.is_ok_and(|shown| shown == text) {
                return true;
            }
        }
        false
    })
    .await;
}

/// Waits until nothing that is displayed is selected by `css`.
async fn hides(browser: &Client, css: &str) {
    until(&format!("{css} is gone"), async || {
        for element in browser.find_all(Locator::Css(css)).await.unwrap() {
            if element.is_displayed().await.unwrap_or(true) {
                return false;
            }
        }
        true
    })
    .await;
}

/// Clicks on what `css` selects, once it is there and takes clicks.
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

/// Two windows, each at its page; what one types the other shows.
async fn check(first: &str, second: &str) {
    let driver = Chromedriver::start().await;
    let browser = browser(&driver).await;
    let ann = browser.window().await.unwrap();
    enter(&browser, first, "ann").await;
    let bob = browser.new_window(false).await.unwrap().handle;
    browser.switch_to_window(bob.clone()).await.unwrap();
    enter(&browser, second, "bob").await;

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
    check(&url, &url).await;
    // Browsers offer compression, and compress whatever they send.
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

/// A browser that does not keep to the compression it agreed on is closed with 1007.
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
    shows(&browser, "#status", "The server could not read what this page sent. Reload the page.")
        .await;
    assert_eq!(urls().await.len(), 2);
    browser.close().await.unwrap();
}

#[tokio::test]
async fn a_message_typed_in_one_page_appears_on_another_node() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    check(&format!("http://{}/", one.address), &format!("http://{}/chat", two.address)).await;
}

#[tokio::test]
async fn presence_typing_read_marks_and_rooms_show_on_another_node() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let driver = Chromedriver::start().await;
    let browser = browser(&driver).await;
    let ann = browser.window().await.unwrap();
    enter(&browser, &format!("http://{}/", one.address), "ann").await;
    let bob = browser.new_window(false).await.unwrap().handle;
    browser.switch_to_window(bob.clone()).await.unwrap();
    enter(&browser, &format!("http://{}/", two.address), "bob").await;
    let to = async |window: &fantoccini::wd::WindowHandle| {
        browser.switch_to_window(window.clone()).await.unwrap();
    };

    // Who was there is listed, and who comes is told.
    shows(&browser, "#people", "ann\nbob (you)").await;
    shows(&browser, "#people-title", "2 people here").await;
    shows(&browser, "#online", "2 people online").await;
    to(&ann).await;
    shows(&browser, "#people", "ann (you)\nbob").await;

    fill(&browser, "#input", "hello").await;
    to(&bob).await;
    shows(&browser, "#typing", "ann is typing…").await;
    to(&ann).await;
    press_enter(&browser, "#input").await;
    to(&bob).await;
    shows(&browser, ".message .content", "hello").await;
    // Sending ends it, not the six seconds after which it would end by itself.
    let typing = browser.find(Locator::Css("#typing")).await.unwrap();
    assert_eq!(typing.text().await.unwrap(), "");
    to(&ann).await;
    shows(&browser, ".message.own .readers", "read by bob").await;

    click(&browser, "#create summary").await;
    fill(&browser, "#new-room", "den").await;
    fill(&browser, "#new-password", "secret").await;
    click(&browser, "#create-room").await;
    shows(&browser, "#title", "den").await;
    shows(&browser, "#about", "made by you, with a password").await;

    to(&bob).await;
    click(&browser, "#refresh").await;
    click(&browser, "#public-rooms [data-room=den]").await;
    shows(&browser, "#problem", "This room asks for a password.").await;
    fill(&browser, "#again-password", "guess").await;
    press_enter(&browser, "#again-password").await;
    shows(&browser, "#problem", "That is not the password of this room.").await;
    fill(&browser, "#again-password", "secret").await;
    press_enter(&browser, "#again-password").await;
    shows(&browser, "#people", "ann\nbob (you)").await;
    hides(&browser, "#problem, #delete").await;

    to(&ann).await;
    shows(&browser, "#people-title", "2 people here").await;
    click(&browser, "#delete").await;
    within(browser.accept_alert()).await.unwrap();
    shows(&browser, "#hint-text", "You deleted the room den.").await;
    to(&bob).await;
    shows(&browser, "#hint-text", "The room den was closed (deleted).").await;
    // The other room is still there, and it is the one that is shown.
    shows(&browser, "#rooms", "lobby").await;
    shows(&browser, "#title", "lobby").await;
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
    enter(&browser, &format!("http://{}/", one.address), "ann").await;
    let bob = browser.new_window(false).await.unwrap().handle;
    browser.switch_to_window(bob.clone()).await.unwrap();
    enter(&browser, &format!("http://{}/", two.address), "bob").await;
    let to = async |window: &fantoccini::wd::WindowHandle| {
        browser.switch_to_window(window.clone()).await.unwrap();
    };

    // From within a room; what was sent is shown as the conversation that it belongs to.
    to(&ann).await;
    fill(&browser, "#input", "@bob hi").await;
    press_enter(&browser, "#input").await;
    shows(&browser, "#title", "bob").await;
    shows(&browser, ".message.own[data-state=sent] .content", "hi").await;
    shows(&browser, "#about", "online").await;

    // The other one hears of it while reading a room, which has nothing of it.
    to(&bob).await;
    shows(&browser, "#directs [data-user=ann] .unread", "1").await;
    assert!(texts(&browser).await.is_empty());
    click(&browser, "#directs [data-user=ann]").await;
    shows(&browser, "#title", "ann").await;
    shows(&browser, ".message .content", "hi").await;
    hides(&browser, "#directs .unread").await;
    fill(&browser, "#input", "hi <b>ann</b>").await;
    press_enter(&browser, "#input").await;
    shows(&browser, ".message.own[data-state=sent] .content", "hi <b>ann</b>").await;

    to(&ann).await;
    shows(&browser, ".message .content", "hi <b>ann</b>").await;
    assert_eq!(texts(&browser).await, ["hi", "hi <b>ann</b>"]);
    hides(&browser, "#directs .unread").await;

    // Loaded again, the page still knows with whom there was a conversation, and asks for it.
    enter(&browser, &format!("http://{}/", one.address), "ann").await;
    click(&browser, "#directs [data-user=bob]").await;
    until("the conversation is whole", async || texts(&browser).await == ["hi", "hi <b>ann</b>"])
        .await;
    browser.close().await.unwrap();
}
