//! `deploy/rolling-update.sh` against a fake `docker` that only stores containers: the script can
//! be run again after any failure, and ends with the same number of gateways, all with the new
//! image.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

/// Implements the Docker commands that the script uses. A container is a file: its image, status
/// and health. `fail` names a command that fails once: before it has an effect, or, if followed by
/// `late`, after that. `min` holds the smallest number of healthy containers so far.
const FAKE: &str = r#"#!/bin/sh
set -eu
cd "$STATE"
# Few processes, since this is called often: `read` in place of `cat`.
what() { # file
    text=
    [ ! -e "$1" ] || read -r text < "$1"
}
note_min() {
    healthy=0
    for file in containers/*; do
        what "$file"
        case $text in *"running healthy") healthy=$((healthy + 1)) ;; esac
    done
    what min
    [ "$healthy" -ge "$text" ] || echo "$healthy" > min
}
fails() { # name
    what fail
    [ "$text" = "$1" ] || return 1
    rm fail
    echo "fake docker: $1 fails" >&2
}
create() { # health
    what last
    number=$((text + 1))
    echo "$number" > last
    what image
    echo "$text running $1" > "containers/c$number"
}
count() { count=$#; }
echo "$*" >> calls
case "$1 ${2:-}" in
"compose build") ! fails build || exit 1 ;;
"compose run") ! fails check || exit 64 ;;
"compose config")
    for service in gateway nginx; do echo "  $service:"; echo "    image: skein-$service"; done
    ;;
"image inspect")
    for name in "$@"; do :; done
    [ "$name" = skein-gateway ] || { echo "fake docker: no image $name" >&2; exit 1; }
    what image
    echo "$text"
    ;;
"compose ps") ! fails ps || exit 1; cd containers; echo * ;;
"inspect --format")
    ! fails inspect || exit 1
    shift 3
    for name in "$@"; do what "containers/$name"; echo "$name $text"; done
    ;;
"logs --tail") ;;
"compose up")
    ! fails up || exit 1
    for argument in "$@"; do
        case $argument in gateway=*) scale=${argument#gateway=} ;; esac
    done
    # Compose starts what stands still before it creates anything.
    for file in containers/*; do
        what "$file"
        case $text in *"exited none") echo "${text%% *} running healthy" > "$file" ;; esac
    done
    count containers/*
    while [ "$count" -lt "$scale" ]; do
        if fails unhealthy; then create unhealthy; else create healthy; fi
        count containers/*
    done
    for file in containers/*; do
        what "$file"
        case $text in *unhealthy) exit 1 ;; esac
    done
    ! fails "up late" || exit 1
    ;;
"stop "*)
    ! fails stop || exit 1
    what "containers/$2"
    echo "${text%% *} exited none" > "containers/$2"
    note_min
    ! fails "stop late" || exit 1
    ;;
"rm "*)
    ! fails rm || exit 1
    for last in "$@"; do :; done
    rm "containers/$last"
    note_min
    ;;
*) echo "fake docker: what is $*" >&2; exit 2 ;;
esac
"#;

struct Docker {
    folder: TempDir,
}

impl Docker {
    /// Starts with gateways of image `a`, and a newer image `b`.
    fn with_gateways(count: usize) -> Self {
        let docker = Self { folder: TempDir::new().unwrap() };
        let path = docker.folder.path();
        fs::create_dir_all(path.join("state/containers")).unwrap();
        fs::create_dir_all(path.join("bin")).unwrap();
        fs::create_dir_all(path.join("project/deploy")).unwrap();
        let fake = path.join("bin/docker");
        fs::write(&fake, FAKE).unwrap();
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
        // The script works on its parent folder.
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/rolling-update.sh");
        fs::copy(script, path.join("project/deploy/rolling-update.sh")).unwrap();
        docker.set("image", "b");
        docker.set("last", &count.to_string());
        docker.set("min", "99");
        for number in 1..=count {
            docker.set(&format!("containers/c{number}"), "a running healthy");
        }
        docker
    }

    fn state(&self, name: &str) -> PathBuf {
        self.folder.path().join("state").join(name)
    }

    fn set(&self, name: &str, text: &str) {
        fs::write(self.state(name), format!("{text}\n")).unwrap();
    }

    fn get(&self, name: &str) -> String {
        self.text_of(name).trim().to_owned()
    }

    fn text_of(&self, name: &str) -> String {
        fs::read_to_string(self.state(name)).unwrap_or_default()
    }

    /// Runs the script. Returns whether it succeeded, and what it printed.
    fn update(&self, arguments: &[&str]) -> (bool, String) {
        let path = format!(
            "{}:{}",
            self.folder.path().join("bin").display(),
            std::env::var("PATH").unwrap()
        );
        let output = Command::new("sh")
            .arg(self.folder.path().join("project/deploy/rolling-update.sh"))
            .args(arguments)
            .envs([("PATH", path.as_str()), ("SETTLE", "0")])
            .env("STATE", self.folder.path().join("state"))
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// The state of each container, sorted.
    fn containers(&self) -> Vec<String> {
        let files = fs::read_dir(self.state("containers")).unwrap();
        let mut all: Vec<String> = files
            .map(|file| fs::read_to_string(file.unwrap().path()).unwrap().trim().to_owned())
            .collect();
        all.sort();
        all
    }

    #[track_caller]
    fn is_updated(&self, count: usize, (done, output): (bool, String)) {
        assert!(done, "{output}\n{:?}", self.containers());
        assert_eq!(self.containers(), vec!["b running healthy"; count], "{output}");
        assert!(!self.folder.path().join("project/deploy/.rolling-update").exists());
    }
}

#[test]
fn a_rolling_update_replaces_each_gateway_once() {
    let docker = Docker::with_gateways(3);
    docker.is_updated(3, docker.update(&[]));
    assert_eq!((docker.get("last"), docker.get("min")), ("6".to_owned(), "3".to_owned()));
    // A second run has nothing to do.
    fs::remove_file(docker.state("calls")).unwrap();
    docker.is_updated(3, docker.update(&[]));
    let calls = docker.get("calls");
    assert!(!calls.contains("compose up") && !calls.contains("stop"), "{calls}");
    // The number of gateways changes during an update.
    docker.set("image", "b");
    docker.is_updated(2, docker.update(&["2"]));
    docker.is_updated(4, docker.update(&["4"]));
    let (done, output) = docker.update(&["none"]);
    assert!(!done && output.contains("COUNT is 'none'"), "{output}");
}

#[test]
fn a_rolling_update_resumes_after_any_failure() {
    for failure in
        ["build", "check", "ps", "inspect", "up", "up late", "unhealthy", "stop", "stop late", "rm"]
    {
        let docker = Docker::with_gateways(2);
        docker.set("fail", failure);
        let (done, output) = docker.update(&[]);
        assert!(!done, "{failure}: {output}");
        let left = docker.containers().len();
        assert!((2..=3).contains(&left), "{failure}: {:?}", docker.containers());
        docker.is_updated(2, docker.update(&[]));
        let min: usize = docker.get("min").parse().unwrap();
        assert_eq!(min, 2, "{failure}: fewer were healthy meanwhile");
    }
}

#[test]
fn a_rolling_update_changes_nothing_if_the_configuration_is_bad() {
    let docker = Docker::with_gateways(2);
    docker.set("fail", "check");
    let (done, output) = docker.update(&[]);
    assert!(!done && output.contains("nothing was changed"), "{output}");
    let calls = docker.text_of("calls");
    assert!(calls.contains("compose run --rm --no-deps -T gateway check-config"), "{calls}");
    assert!(!calls.contains("compose up") && !calls.contains("stop"), "{calls}");
    assert_eq!(docker.containers(), vec!["a running healthy"; 2], "{output}");
}

#[test]
fn a_rolling_update_removes_leftovers_of_a_machine_crash() {
    let docker = Docker::with_gateways(3);
    docker.set("containers/c1", "a exited none");
    docker.set("containers/c2", "a running unhealthy");
    docker.is_updated(3, docker.update(&["3"]));
    // If no container is healthy, an update stops none.
    let docker = Docker::with_gateways(2);
    for name in ["containers/c1", "containers/c2"] {
        docker.set(name, "a running unhealthy");
    }
    let (done, output) = docker.update(&[]);
    assert!(!done && docker.containers() == vec!["a running unhealthy"; 2], "{output}");
}
