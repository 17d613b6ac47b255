package proc

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestIsolation(t *testing.T) {
	needIsolation(t)
	secret := t.TempDir()
	model := filepath.Join(secret, "models", "m.onnx")
	if err := os.MkdirAll(filepath.Dir(model), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(model, []byte("weights"), 0o644); err != nil {
		t.Fatal(err)
	}
	extra := t.TempDir()
	spec := sh(t, `
		echo user $(id -u)
		echo pids $(ls -d /proc/[0-9]* | wc -l)
		echo tmp $(ls -A /var/tmp | wc -l)
		( : >/etc/rx-test ) 2>/dev/null && echo host writable
		( : >/usr/rx-test ) 2>/dev/null && echo host writable
		: >mine && echo dir writable
		: >$EXTRA/mine && echo extra writable
		: >/tmp/mine && echo tmp writable
		cat $MODEL; echo
		( : >$MODEL ) 2>/dev/null && echo model writable
		grep NoNewPrivs /proc/self/status
		exit 3`)
	spec.Env = append(spec.Env, "EXTRA="+extra, "MODEL="+model)
	spec.Isolation = &Isolation{Writable: []string{extra}, ReadOnly: []string{model}, Hidden: []string{secret}}
	for _, d := range []string{spec.Dir, extra} {
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	st, out := mustRun(t, spec)
	if st.Code != 3 {
		t.Errorf("status %+v", st)
	}
	for _, want := range []string{
		"user 65534\n", "dir writable\n", "extra writable\n", "tmp writable\n", "weights\n", "NoNewPrivs:\t1\n", "tmp 0\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q", want)
		}
	}
	for _, not := range []string{"host writable", "model writable"} {
		if strings.Contains(out, not) {
			t.Errorf("output has %q", not)
		}
	}
	// init, the shell, a subshell and its tools: whatever the host runs besides is not among them
	if strings.Contains(out, "pids 0") || !strings.Contains(out, "pids ") {
		t.Error("no processes seen")
	}
	t.Log(out)
	if _, err := os.Stat(filepath.Join(extra, "mine")); err != nil {
		t.Errorf("file in a writable directory: %v", err)
	}
	if _, err := os.Stat("/tmp/mine"); err == nil {
		t.Error("/tmp was not private")
	}
}

func TestIsolatedProcessesAreInvisibleAndEndTogether(t *testing.T) {
	needIsolation(t)
	spec := sh(t, `ls -d /proc/[0-9]* | wc -l; setsid sleep 1000 & sleep 1000`)
	spec.Isolation = &Isolation{}
	if err := os.Chmod(spec.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	p := mustStart(t, spec)
	eventually(t, "count", func() bool { return strings.HasSuffix(log(spec.Stdout), "\n") })
	if n := strings.TrimSpace(log(spec.Stdout)); len(n) > 1 {
		t.Errorf("sees %s processes", n)
	}
	id := p.Identity()
	var below []procStat
	eventually(t, "three processes", func() bool { below, _ = descendants(id.PID); return len(below) == 3 })
	if !running(id.TaskPID) || below[0].pid != id.TaskPID {
		t.Errorf("task pid %d is not the host's number: %+v", id.TaskPID, below)
	}
	if err := unix.Kill(id.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if st := mustWait(t, p); !st.Lost {
		t.Errorf("status %+v", st)
	}
	eventually(t, "all end with the supervisor", func() bool {
		for _, st := range below {
			if running(st.pid) {
				return false
			}
		}
		return true
	})
}

func TestIsolatedCommandEndsOnSignal(t *testing.T) {
	needIsolation(t)
	spec := sh(t, `exec sleep 1000`)
	spec.Isolation = &Isolation{}
	if err := os.Chmod(spec.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	p := mustStart(t, spec)
	// As init of its namespace it would ignore this.
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if st := mustWait(t, p); st.Signal != int(unix.SIGTERM) {
		t.Errorf("status %+v", st)
	}
}

func TestNoNetwork(t *testing.T) {
	if c := probed(); !c.NoNetwork {
		t.Skipf("no network namespaces here, run as root: %s", c.NetworkReason)
	}
	spec := sh(t, `tail -n +3 /proc/net/dev | wc -l; grep -c 127.0.0.1 /proc/net/fib_trie; wc -l </proc/net/route`)
	spec.NoNetwork = true
	_, out := mustRun(t, spec)
	f := strings.Fields(out)
	if len(f) != 3 || f[0] != "1" || f[1] == "0" || f[2] != "1" {
		t.Errorf("interfaces, loopback addresses, route lines: %q", out)
	}
}
