//! Debian's Chromium, steered by WebDriver (W3C Recommendation, levels 1 and 2).

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpStream},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use clan_lab::{Account, LabError, story};
use serde_json::{Value, json};

/// What the element's key is called in answers (section 12.1).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
const DRAWN: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_secs(60);
const MAX_ANSWER: u64 = 16 << 20;

/// A browser without a window, ended when this is dropped.
pub(crate) struct Chromium {
    driver: Child,
    port: u16,
    session: String,
    _home: tempfile::TempDir,
}

impl Chromium {
    pub(crate) fn start(account: &Account) -> Result<Self, LabError> {
        let failed = |what: &'static str| move |e: std::io::Error| LabError::Promise(format!("{what}: {e}"));
        let home = tempfile::tempdir().map_err(failed("a folder for Chromium"))?;
        std::os::unix::fs::chown(home.path(), Some(account.uid), Some(account.gid))
            .map_err(failed("a folder for Chromium"))?;
        let mut driver = Command::new("chromedriver")
            .args(["--port=0", "--log-level=WARNING"])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", home.path())
            .env("TMPDIR", home.path())
            .current_dir(home.path())
            .uid(account.uid)
            .gid(account.gid)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed("chromedriver (package chromium-driver)"))?;
        // It says on which port it listens, and little else.
        let said = driver.stdout.take().ok_or_else(|| LabError::Promise("chromedriver says nothing".into()))?;
        let port = BufReader::new(said).lines().map_while(Result::ok).find_map(|line| {
            let port = line.split_once("on port ")?.1.trim_end_matches('.').parse().ok()?;
            (port != 0).then_some(port)
        });
        let mut browser = Self { driver, port: port.unwrap_or_default(), session: String::new(), _home: home };
        let options = json!({
            "binary": "/usr/bin/chromium",
            "args": ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1280,1600",
                "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"],
        });
        let wanted =
            json!({ "capabilities": { "alwaysMatch": { "browserName": "chrome", "goog:chromeOptions": options } } });
        let made = browser.ask("POST", "/session", Some(&wanted))?;
        browser.session = made["sessionId"].as_str().unwrap_or_default().to_owned();
        Ok(browser)
    }

    pub(crate) fn open(&mut self, url: &str) -> Result<(), LabError> {
        self.told("POST", "/url", &json!({ "url": url })).map(drop)
    }

    /// Waits until an element's visible text has all of these in it.
    pub(crate) fn shows(&mut self, selector: &str, words: &[&str]) -> Result<(), LabError> {
        let mut text = String::new();
        let shown = story::until(DRAWN, "the page", || {
            text = match self.find(selector)? {
                Some(element) => self.text(&element)?,
                None => String::new(),
            };
            Ok(words.iter().all(|word| text.contains(word)).then_some(()))
        });
        shown.map_err(|_| {
            let missing: Vec<_> = words.iter().filter(|word| !text.contains(**word)).collect();
            LabError::Promise(format!("the page does not show {missing:?}, but:\n{text}"))
        })
    }

    pub(crate) fn gone(&mut self, selector: &str) -> Result<(), LabError> {
        story::until(DRAWN, "something to close", || Ok(self.find(selector)?.is_none().then_some(())))
    }

    pub(crate) fn press(&mut self, selector: &str) -> Result<(), LabError> {
        let element = self.there(selector)?;
        self.told("POST", &format!("/element/{element}/click"), &json!({})).map(drop)
    }

    pub(crate) fn type_into(&mut self, selector: &str, text: &str) -> Result<(), LabError> {
        let element = self.there(selector)?;
        self.told("POST", &format!("/element/{element}/value"), &json!({ "text": text })).map(drop)
    }

    /// Keeps what the window looks like, for whoever looks at the logs.
    pub(crate) fn picture(&mut self, path: &std::path::Path) -> Result<(), LabError> {
        let picture = self.ask("GET", &format!("/session/{}/screenshot", self.session), None)?;
        let bytes = data_encoding::BASE64.decode(picture.as_str().unwrap_or_default().as_bytes());
        let bytes = bytes.map_err(|e| LabError::Promise(format!("the picture of the page: {e}")))?;
        fs::write(path, bytes).map_err(|e| LabError::Promise(format!("{}: {e}", path.display())))
    }

    fn there(&mut self, selector: &str) -> Result<String, LabError> {
        story::until(DRAWN, "something to press", || self.find(selector))
    }

    fn find(&mut self, selector: &str) -> Result<Option<String>, LabError> {
        let found = self.told("POST", "/elements", &json!({ "using": "css selector", "value": selector }))?;
        Ok(found[0][ELEMENT].as_str().map(str::to_owned))
    }

    /// Empty if the element has gone meanwhile.
    fn text(&mut self, element: &str) -> Result<String, LabError> {
        let text = self.ask("GET", &format!("/session/{}/element/{element}/text", self.session), None);
        match text {
            Err(LabError::Promise(why)) if why.contains("stale element") => Ok(String::new()),
            text => Ok(text?.as_str().unwrap_or_default().to_owned()),
        }
    }

    fn told(&mut self, method: &str, path: &str, body: &Value) -> Result<Value, LabError> {
        self.ask(method, &format!("/session/{}{path}", self.session), Some(body))
    }

    fn ask(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, LabError> {
        let failed = |e: std::io::Error| LabError::Promise(format!("chromedriver: {e}"));
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).map_err(failed)?;
        stream.set_read_timeout(Some(ANSWER)).map_err(failed)?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).map_err(failed)?;
        // It says that it closes the connection, and does not.
        let mut answer = BufReader::new(stream);
        let mut length = 0;
        for line in answer.by_ref().lines() {
            let line = line.map_err(failed)?.to_ascii_lowercase();
            match line.split_once(':') {
                Some(("content-length", count)) => length = count.trim().parse().unwrap_or(0),
                _ if line.is_empty() => break,
                _ => {}
            }
        }
        let mut content = String::new();
        answer.take(MAX_ANSWER.min(length)).read_to_string(&mut content).map_err(failed)?;
        let value = serde_json::from_str::<Value>(&content)
            .map_err(|e| LabError::Promise(format!("chromedriver says no JSON: {e}")))?;
        let value = value["value"].clone();
        match value["error"].as_str() {
            Some(error) => Err(LabError::Promise(format!("the browser: {error}: {}", value["message"]))),
            None => Ok(value),
        }
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        let _ = self.told("DELETE", "", &json!({}));
        // Whatever of it is still there is of this process group.
        if let Some(group) = i32::try_from(self.driver.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.driver.wait();
    }
}
