package proc

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// argStarter turns the test binary into a program that starts what its standard input says, prints the identity, and waits
// to be killed.
const argStarter = "test-starter"

func TestMain(m *testing.M) {
	Main()
	if len(os.Args) > 1 && os.Args[1] == argStarter {
		os.Exit(starterMain())
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if c := probed(); c.CgroupParent != "" {
			unix.Rmdir(c.CgroupParent)
		}
		os.Exit(code)
	}))
}

func starterMain() int {
	var spec Spec
	err := json.NewDecoder(os.Stdin).Decode(&spec)
	if err == nil {
		var p *Process
		if p, err = Start(spec); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(p.Identity())
			p.Wait(context.Background())
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// mustStarter runs spec under another process and returns that process and the tree's identity.
func mustStarter(t *testing.T, spec Spec) (*exec.Cmd, Identity) {
	t.Helper()
	conf, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(selfExe, argStarter)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(conf), os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		t.Fatalf("starter: %v", err)
	}
	var id Identity
	if err := json.Unmarshal(line, &id); err != nil {
		t.Fatal(err)
	}
	return cmd, id
}

// sh is a Spec that runs a shell script in a fresh directory and logs to it.
func sh(t *testing.T, script string) Spec {
	t.Helper()
	dir := t.TempDir()
	return Spec{
		Path: "/bin/sh", Args: []string{"-c", script}, Env: []string{"PATH=" + defaultPath}, Dir: dir,
		Stdout:     LogFiles{Dir: dir, Name: "t.stdout"},
		Stderr:     LogFiles{Dir: dir, Name: "t.stderr"},
		StatusFile: filepath.Join(dir, "status.json"),
	}
}

func mustStart(t *testing.T, spec Spec) *Process {
	t.Helper()
	p, err := Start(spec)
	if err != nil {
		t.Fatal(err)
	}
	mustEnd(t, p)
	return p
}

// mustEnd makes sure that the tree does not outlive the test.
func mustEnd(t *testing.T, p *Process) {
	t.Cleanup(func() {
		if _, err := p.Stop(context.Background(), unix.SIGKILL, 0); err != nil {
			t.Errorf("stop: %v", err)
		}
		p.Detach()
	})
}

func mustWait(t *testing.T, p *Process) ExitStatus {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	st, err := p.Wait(ctx)
	if err != nil {
		t.Fatalf("wait: %v", err)
	}
	return st
}

// mustRun runs the script to its end and returns what it printed.
func mustRun(t *testing.T, spec Spec) (ExitStatus, string) {
	t.Helper()
	p := mustStart(t, spec)
	st := mustWait(t, p)
	if msg := log(spec.Stderr); msg != "" {
		t.Logf("stderr: %s", msg)
	}
	return st, log(spec.Stdout)
}

func log(l LogFiles) string {
	b, _ := os.ReadFile(filepath.Join(l.Dir, l.Name+".0"))
	return string(b)
}

// patience bounds waits that end at once unless something is broken.
const patience = 60 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// pidFrom waits for a script to write a pid to a file.
func pidFrom(t *testing.T, path string) int {
	t.Helper()
	var pid int
	eventually(t, path+" holds a pid", func() bool {
		b, err := os.ReadFile(path)
		if err != nil || !bytes.HasSuffix(b, []byte("\n")) {
			return false
		}
		pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
		return err == nil
	})
	return pid
}

func running(pid int) bool {
	st, err := readStat(pid)
	return err == nil && st.alive()
}

const testParent = "rxvision-proc-test.slice"

var probed = sync.OnceValue(func() Capabilities { return Probe(context.Background(), testParent) })

// needIsolation skips where the system refuses namespaces.
func needIsolation(t *testing.T) {
	t.Helper()
	if c := probed(); !c.Isolation {
		t.Skipf("no isolation here, run as root with CAP_SYS_ADMIN: %s", c.IsolateReason)
	}
}

// needCgroup skips where there is no group to write to, and returns the name of a fresh one.
func needCgroup(t *testing.T) string {
	t.Helper()
	c := probed()
	if c.CgroupParent == "" {
		t.Skipf("no cgroup v2 here, run as root on a host that mounts it: %s", c.CgroupReason)
	}
	return filepath.Join(c.CgroupParent, fmt.Sprintf("%s-%d", strings.ReplaceAll(t.Name(), "/", "-"), os.Getpid()))
}
