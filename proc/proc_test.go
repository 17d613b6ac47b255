package proc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestExitStatus(t *testing.T) {
	for _, c := range []struct {
		script       string
		code, signal int
	}{
		{"exit 0", 0, 0},
		{"exit 3", 3, 0},
		{"exit 255", 255, 0},
		{"kill -KILL $$", 137, 9},
		{"kill -TERM $$", 143, 15},
	} {
		t.Run(c.script, func(t *testing.T) {
			spec := sh(t, c.script)
			st, _ := mustRun(t, spec)
			if st.Code != c.code || st.Signal != c.signal || st.Lost || st.OOMKilled {
				t.Errorf("got %+v, want code %d signal %d", st, c.code, c.signal)
			}
			if st.Success() != (c.code == 0) {
				t.Errorf("Success is %v", st.Success())
			}
			if st.Started.IsZero() || st.Finished.Before(st.Started) {
				t.Errorf("times %v, %v", st.Started, st.Finished)
			}
		})
	}
}

func TestStartErrorsLeaveNothing(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, want string
		change     func(*Spec)
	}{
		{"missing program", "no such file", func(s *Spec) { s.Path = "/nowhere/program" }},
		{"not in PATH", "in PATH", func(s *Spec) { s.Path = "no-such-program" }},
		{"not executable", "not executable", func(s *Spec) { s.Path = "/etc/passwd" }},
		{"not a program", "exec format error", func(s *Spec) { s.Path = plain }},
		{"not a program, staged", "exec format error", func(s *Spec) { s.Path = plain; s.Rlimits.OpenFiles = 64 }},
		{"missing directory", "no such file", func(s *Spec) { s.Dir = "/nowhere" }},
		{"missing log directory", "log", func(s *Spec) { s.Stdout.Dir = "/nowhere" }},
		{"unknown user", "no-such-user", func(s *Spec) { s.User = "no-such-user" }},
		{"relative paths", "is not absolute", func(s *Spec) { s.Dir, s.StatusFile = "x", "y" }},
		{"limits without cgroup", "need a cgroup", func(s *Spec) { s.Limits.MemoryBytes = 1 }},
		{"orphans in a namespace", "as a whole", func(s *Spec) { s.LeaveOrphans, s.Isolation = true, &Isolation{} }},
		{"log name with a slash", "plain file name", func(s *Spec) { s.Stdout.Name = "../x" }},
		{"NUL in an argument", "NUL", func(s *Spec) { s.Args = []string{"a\x00b"} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := sh(t, "exit 0")
			c.change(&spec)
			p, err := Start(spec)
			if err == nil {
				p.Detach()
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %q lacks %q", err, c.want)
			}
			if below, _ := descendants(os.Getpid()); len(below) > 0 {
				t.Errorf("left processes %+v", below)
			}
		})
	}
}

func TestEnvironmentIsExactlyAsGiven(t *testing.T) {
	for _, env := range [][]string{{"A=1", "B=two words", "PATH=/bin"}, {}, nil} {
		spec := sh(t, "")
		spec.Path, spec.Args, spec.Env = "/usr/bin/env", nil, env
		_, out := mustRun(t, spec)
		want := ""
		for _, kv := range env {
			want += kv + "\n"
		}
		if out != want {
			t.Errorf("environment %q, want %q", out, want)
		}
	}
}

func TestStdinDirSession(t *testing.T) {
	spec := sh(t, `cat; pwd; echo $$ $(cut -d" " -f6 /proc/$$/stat)`)
	_, out := mustRun(t, spec)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 2 || lines[0] != spec.Dir {
		t.Fatalf("output %q", out)
	}
	if f := strings.Fields(lines[1]); f[0] != f[1] {
		t.Errorf("the command %s is not leader of its session %s", f[0], f[1])
	}
}

func TestReattachAfterStarterWasKilled(t *testing.T) {
	spec := sh(t, `i=0; while [ ! -e stop ]; do i=$((i+1)); echo line $i; sleep 0.01; done; exit 7`)
	starter, id := mustStarter(t, spec)
	eventually(t, "first line", func() bool { return strings.Contains(log(spec.Stdout), "line 1\n") })
	if err := starter.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	starter.Wait()

	before := len(log(spec.Stdout))
	eventually(t, "logs flow while nobody watches", func() bool { return len(log(spec.Stdout)) > before+20 })

	again, err := json.Marshal(id)
	if err != nil {
		t.Fatal(err)
	}
	var kept Identity
	if err := json.Unmarshal(again, &kept); err != nil {
		t.Fatal(err)
	}
	p, err := Attach(kept)
	if err != nil {
		t.Fatal(err)
	}
	mustEnd(t, p)
	if u, err := p.Usage(); err != nil || u.RSS == 0 || u.Processes == 0 {
		t.Errorf("usage %+v, %v", u, err)
	}
	select {
	case <-p.Done():
		t.Fatal("done while it runs")
	default:
	}
	if err := os.WriteFile(filepath.Join(spec.Dir, "stop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if st := mustWait(t, p); st.Code != 7 || st.Lost {
		t.Errorf("status %+v, want code 7", st)
	}
}

func TestCollectWhatEndedUnwatched(t *testing.T) {
	spec := sh(t, `while [ ! -e stop ]; do sleep 0.01; done; exit 9`)
	starter, id := mustStarter(t, spec)
	starter.Process.Kill()
	starter.Wait()
	if _, err := Collect(id); err == nil || !strings.Contains(err.Error(), "still runs") {
		t.Errorf("Collect of a running tree: %v", err)
	}
	if err := os.WriteFile(filepath.Join(spec.Dir, "stop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "supervisor ends", func() bool { return !running(id.PID) })
	if _, err := Attach(id); !errors.Is(err, ErrGone) {
		t.Fatalf("Attach: %v, want ErrGone", err)
	}
	if st, err := Collect(id); err != nil || st.Code != 9 {
		t.Errorf("collected %+v, %v, want code 9", st, err)
	}
}

func TestFind(t *testing.T) {
	ctx := context.Background()
	spec := sh(t, "sleep 1000")
	if _, err := Find(ctx, spec.StatusFile); !errors.Is(err, ErrNotStarted) {
		t.Errorf("before any start: %v", err)
	}
	starter, id := mustStarter(t, spec)
	starter.Process.Kill()
	starter.Wait()
	found, err := Find(ctx, spec.StatusFile)
	if err != nil || found != id {
		t.Errorf("found %+v, %v, want %+v", found, err, id)
	}
	if _, err := Start(spec); err == nil || !strings.Contains(err.Error(), "still runs") {
		t.Errorf("second start with the same status file: %v", err)
	}
	p, err := Attach(found)
	if err != nil {
		t.Fatal(err)
	}
	mustEnd(t, p)
	if _, err := p.Stop(ctx, unix.SIGKILL, 0); err != nil {
		t.Fatal(err)
	}
	if found, err = Find(ctx, spec.StatusFile); err != nil || found != id {
		t.Errorf("after the end: %+v, %v", found, err)
	}
	bad := spec
	bad.Dir = "/nowhere"
	if _, err := Start(bad); err == nil {
		t.Error("started in a missing directory")
	}
	if _, err := Find(ctx, spec.StatusFile); !errors.Is(err, ErrNotStarted) {
		t.Errorf("after a failed start: %v", err)
	}
}

// TestStarterKilledAtAnyMoment: whatever the moment, Find gives the tree that runs, or there is none.
func TestStarterKilledAtAnyMoment(t *testing.T) {
	started := 0
	for i := range 25 {
		spec := sh(t, "exec sleep 1000")
		conf, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(selfExe, argStarter)
		cmd.Stdin = bytes.NewReader(conf)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "start begins", func() bool { _, err := os.Stat(spec.StatusFile + identitySuffix); return err == nil })
		for range i * 1500 { // not a wait for anything: it spreads the moments
			runtime.Gosched()
		}
		cmd.Process.Kill()
		cmd.Wait()
		id, err := Find(context.Background(), spec.StatusFile)
		if errors.Is(err, ErrNotStarted) {
			all, err := allStats()
			if err != nil {
				t.Fatal(err)
			}
			for _, st := range all {
				if dir, _ := os.Readlink("/proc/" + strconv.Itoa(st.pid) + "/cwd"); dir == spec.Dir {
					t.Errorf("moment %d: %d runs", i, st.pid)
				}
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		p, err := Attach(id)
		if err != nil {
			t.Fatalf("moment %d: %v", i, err)
		}
		if st, err := p.Stop(context.Background(), unix.SIGKILL, 0); err != nil || st.Signal != 9 {
			t.Errorf("moment %d: %+v, %v", i, st, err)
		}
		p.Detach()
		started++
	}
	t.Logf("%d of 25 were running", started)
}

func TestReusedPidIsNotMistaken(t *testing.T) {
	p := mustStart(t, sh(t, "sleep 1000"))
	for name, change := range map[string]func(*Identity){
		"other start time": func(id *Identity) { id.StartTime++; id.TaskStart++ },
		"other boot":       func(id *Identity) { id.BootID = "00000000-0000-0000-0000-000000000000" },
		"no such process":  func(id *Identity) { id.PID, id.TaskPID = 1<<22+1, 1<<22+2 },
	} {
		id := p.Identity()
		id.StatusFile += ".none"
		change(&id)
		if q, err := Attach(id); !errors.Is(err, ErrGone) {
			t.Errorf("%s: Attach gives %v, %v", name, q, err)
		}
		if st, err := Collect(id); err != nil || !st.Lost {
			t.Errorf("%s: Collect gives %+v, %v", name, st, err)
		}
	}
	if !running(p.Identity().PID) || !running(p.Identity().TaskPID) {
		t.Error("the stranger was killed")
	}
}

func TestKilledSupervisorTakesTheTreeAlong(t *testing.T) {
	spec := sh(t, `sleep 1000 & echo $! >child; exec sleep 1000`)
	p := mustStart(t, spec)
	child := pidFrom(t, filepath.Join(spec.Dir, "child"))
	id := p.Identity()
	if err := unix.Kill(id.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	st := mustWait(t, p)
	if !st.Lost || st.Success() || st.Code != -1 {
		t.Errorf("status %+v, want lost", st)
	}
	eventually(t, "command and child end", func() bool { return !running(id.TaskPID) && !running(child) })
	if err := p.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal afterwards: %v", err)
	}
}

// A daemon leaves the session and the process group; only parentage finds it.
const daemonScript = `setsid sh -c 'echo $$ >daemon; exec sleep 1000' & `

func TestStopEndsTheWholeTree(t *testing.T) {
	spec := sh(t, daemonScript+`sleep 1000 & echo $! >child; wait`)
	p := mustStart(t, spec)
	daemon, child := pidFrom(t, filepath.Join(spec.Dir, "daemon")), pidFrom(t, filepath.Join(spec.Dir, "child"))
	st, err := p.Stop(context.Background(), unix.SIGTERM, patience)
	if err != nil || st.Signal != int(unix.SIGTERM) {
		t.Errorf("stop: %+v, %v", st, err)
	}
	if running(daemon) || running(child) || running(p.Identity().TaskPID) {
		t.Error("something is left")
	}
}

func TestNothingOutlivesTheCommand(t *testing.T) {
	spec := sh(t, daemonScript+`while [ ! -s daemon ]; do sleep 0.01; done; exit 4`)
	p := mustStart(t, spec)
	if st := mustWait(t, p); st.Code != 4 {
		t.Errorf("status %+v", st)
	}
	if running(pidFrom(t, filepath.Join(spec.Dir, "daemon"))) {
		t.Error("the daemon is left")
	}
}

func TestLeaveOrphans(t *testing.T) {
	spec := sh(t, `setsid sleep 1000 >/dev/null 2>&1 & echo $! >child`)
	spec.LeaveOrphans = true
	p := mustStart(t, spec)
	child := pidFrom(t, filepath.Join(spec.Dir, "child"))
	defer func() { _ = unix.Kill(child, unix.SIGKILL) }()
	if st := mustWait(t, p); !st.Success() {
		t.Fatalf("status %+v", st)
	}
	if !running(child) {
		t.Error("what the command left running was killed")
	}
}

func TestStopGrace(t *testing.T) {
	t.Run("command ends by itself", func(t *testing.T) {
		spec := sh(t, `trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done`)
		p := mustStart(t, spec)
		eventually(t, "ready", func() bool { return log(spec.Stdout) != "" })
		if st, err := p.Stop(context.Background(), unix.SIGTERM, patience); err != nil || st.Code != 5 {
			t.Errorf("stop: %+v, %v", st, err)
		}
	})
	ignore := `trap '' TERM; echo ready; while :; do sleep 0.01; done`
	t.Run("command ignores it", func(t *testing.T) {
		spec := sh(t, ignore)
		p := mustStart(t, spec)
		eventually(t, "ready", func() bool { return log(spec.Stdout) != "" })
		if st, err := p.Stop(context.Background(), unix.SIGTERM, time.Millisecond); err != nil || st.Signal != 9 {
			t.Errorf("stop: %+v, %v", st, err)
		}
	})
	t.Run("context ends the grace", func(t *testing.T) {
		spec := sh(t, ignore)
		p := mustStart(t, spec)
		eventually(t, "ready", func() bool { return log(spec.Stdout) != "" })
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if st, err := p.Stop(ctx, unix.SIGTERM, 24*time.Hour); err != nil || st.Signal != 9 {
			t.Errorf("stop: %+v, %v", st, err)
		}
	})
	t.Run("stopped command", func(t *testing.T) {
		p := mustStart(t, sh(t, `kill -STOP $$`))
		if st, err := p.Stop(context.Background(), unix.SIGTERM, time.Millisecond); err != nil || st.Signal == 0 {
			t.Errorf("stop: %+v, %v", st, err)
		}
	})
}

func TestSupervisorForwardsSignals(t *testing.T) {
	spec := sh(t, `trap 'echo got; exit 6' USR1; echo ready; while :; do sleep 0.01; done`)
	p := mustStart(t, spec)
	eventually(t, "ready", func() bool { return log(spec.Stdout) != "" })
	if err := unix.Kill(p.Identity().PID, unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if st := mustWait(t, p); st.Code != 6 {
		t.Errorf("status %+v", st)
	}
}

func TestDieWithParent(t *testing.T) {
	spec := sh(t, `sleep 1000 & echo $! >child; wait`)
	spec.DieWithParent = true
	starter, id := mustStarter(t, spec)
	child := pidFrom(t, filepath.Join(spec.Dir, "child"))
	starter.Process.Kill()
	starter.Wait()
	eventually(t, "tree ends", func() bool { return !running(id.PID) && !running(id.TaskPID) && !running(child) })
	if st, err := Collect(id); err != nil || st.Signal != 9 || st.Lost {
		t.Errorf("collected %+v, %v", st, err)
	}
}

func TestDetach(t *testing.T) {
	p := mustStart(t, sh(t, "sleep 1000"))
	q, err := Attach(p.Identity())
	if err != nil {
		t.Fatal(err)
	}
	q.Detach()
	q.Detach()
	if _, err := q.Wait(context.Background()); !errors.Is(err, ErrDetached) {
		t.Errorf("wait after detach: %v", err)
	}
	if !running(p.Identity().TaskPID) {
		t.Error("detaching ended the command")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := p.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("wait with an ended context: %v", err)
	}
}

func TestUsageCountsTheTree(t *testing.T) {
	spec := sh(t, `sh -c 'i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done'; echo done; sleep 1000 & sleep 1000`)
	p := mustStart(t, spec)
	eventually(t, "work is done", func() bool { return log(spec.Stdout) != "" })
	var u Usage
	eventually(t, "three processes", func() bool {
		var err error
		u, err = p.Usage()
		return err == nil && u.Processes == 3
	})
	if u.CPU <= 0 || u.RSS <= 0 {
		t.Errorf("usage %+v: the ended child is not counted", u)
	}
	p.Stop(context.Background(), unix.SIGKILL, 0)
	if _, err := p.Usage(); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("usage afterwards: %v", err)
	}
}

func TestRlimits(t *testing.T) {
	spec := sh(t, `ulimit -n; ulimit -t; ulimit -f`)
	spec.Rlimits = Rlimits{CPUSeconds: 100, FileBytes: 1 << 20, OpenFiles: 77}
	if _, out := mustRun(t, spec); out != "77\n100\n2048\n" {
		t.Errorf("limits %q", out)
	}
	spec = sh(t, `while :; do :; done`)
	spec.Rlimits.CPUSeconds = 1
	if st, _ := mustRun(t, spec); st.Signal != int(unix.SIGXCPU) && st.Signal != int(unix.SIGKILL) {
		t.Errorf("endless loop ended with %+v", st)
	}
}

func TestOOMScore(t *testing.T) {
	spec := sh(t, `cat /proc/self/oom_score_adj`)
	spec.OOMScoreAdj = 321
	if _, out := mustRun(t, spec); out != "321\n" {
		t.Errorf("oom_score_adj %q", out)
	}
}

func TestUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("run as root to change users")
	}
	spec := sh(t, `id -u; id -g; id -G; cut -d" " -f4 /proc/self/stat >/dev/null; echo end`)
	spec.User = "65534"
	if _, out := mustRun(t, spec); !strings.HasPrefix(out, "65534\n65534\n65534\n") {
		t.Errorf("identity %q", out)
	}
	// The change of user clears the parent-death signal; it must have been set again.
	spec = sh(t, `exec sleep 1000`)
	spec.User = "nobody"
	p := mustStart(t, spec)
	if err := unix.Kill(p.Identity().PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	mustWait(t, p)
	eventually(t, "command dies with its supervisor", func() bool { return !running(p.Identity().TaskPID) })
}

func TestOutput(t *testing.T) {
	out, err := Output(context.Background(), Spec{Path: "echo", Args: []string{"hello"}})
	if err != nil || string(out) != "hello\n" {
		t.Errorf("output %q, %v", out, err)
	}
	_, err = Output(context.Background(), Spec{Path: "sh", Args: []string{"-c", "echo a >&2; echo why >&2; exit 3"}})
	if err == nil || !strings.Contains(err.Error(), "exit code 3: why") {
		t.Errorf("failure: %v", err)
	}
	_, err = Output(context.Background(), Spec{Path: "head", Args: []string{"-c", strconv.Itoa(outputLimit + 1), "/dev/zero"}})
	if err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("too much: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err = Output(ctx, Spec{Path: "sleep", Args: []string{"1000"}}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
}

// TestSupervisorCost prints what doc.go states.
func TestSupervisorCost(t *testing.T) {
	begin := time.Now()
	p := mustStart(t, sh(t, "sleep 1000"))
	took := time.Since(begin)
	b, err := os.ReadFile("/proc/" + strconv.Itoa(p.Identity().PID) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "Rss") || strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "Threads") {
			t.Log(strings.TrimSpace(line))
		}
	}
	t.Logf("start took %v", took)
}
