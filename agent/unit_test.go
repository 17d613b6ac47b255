package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
)

func TestDecide(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	policy := func(attempts int, mode string) *cluster.RestartPolicy {
		return &cluster.RestartPolicy{Attempts: attempts, Interval: time.Minute, Delay: time.Second, Mode: mode}
	}
	ago := func(d time.Duration, count int) localTask {
		return localTask{Window: now.Add(-d).UnixNano(), Count: count}
	}
	for _, c := range []struct {
		name   string
		policy *cluster.RestartPolicy
		kind   string
		how    outcome
		local  localTask
		want   verdict
		count  int
	}{
		{"batch succeeds", policy(3, "fail"), "batch", succeeded, localTask{}, verdict{}, 0},
		{"batch breaks", policy(3, "fail"), "batch", broke, localTask{}, verdict{true, time.Second, reasonWithinPolicy, false}, 1},
		{"service ends well", policy(3, "fail"), "service", succeeded, localTask{}, verdict{true, time.Second, reasonWithinPolicy, false}, 1},
		{"delays grow", policy(9, "fail"), "service", broke, ago(time.Second, 3), verdict{true, 8 * time.Second, reasonWithinPolicy, false}, 4},
		{"up to a bound", policy(99, "fail"), "service", broke, ago(time.Second, 60), verdict{true, maxRestartDelay, reasonWithinPolicy, false}, 61},
		{"no restarts", policy(0, "fail"), "service", broke, localTask{}, verdict{reason: reasonNoRestarts, failed: true}, 0},
		{"no policy", nil, "service", broke, localTask{}, verdict{reason: reasonNoRestarts, failed: true}, 0},
		{"too many", policy(2, "fail"), "service", broke, ago(time.Second, 2), verdict{reason: `Exceeded allowed attempts 2 in interval 1m0s and mode is "fail"`, failed: true}, 2},
		{"too many, long ago", policy(2, "fail"), "service", broke, ago(time.Hour, 2), verdict{true, time.Second, reasonWithinPolicy, false}, 1},
		{"too many, delayed", policy(2, "delay"), "service", broke, ago(20*time.Second, 2), verdict{true, 41 * time.Second, reasonDelay, false}, 0},
		{"none but delayed", policy(0, "delay"), "service", broke, localTask{}, verdict{true, 61 * time.Second, reasonDelay, false}, 0},
		{"hopeless", policy(9, "delay"), "service", unrecoverable, localTask{}, verdict{reason: reasonUnrecoverable, failed: true}, 0},
	} {
		local := c.local
		if got := decide(c.policy, c.kind, c.how, &local, now, 0); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
		if local.Count != c.count {
			t.Errorf("%s: count %d, want %d", c.name, local.Count, c.count)
		}
	}
	p := &cluster.RestartPolicy{Attempts: 1, Interval: time.Hour, Delay: 20 * time.Minute, Mode: "fail"}
	if got := decide(p, "service", broke, &localTask{}, now, 0.5); got.delay != 20*time.Minute+150*time.Second {
		t.Errorf("a policy's long delay with jitter is %s", got.delay)
	}
}

// TestRunsAreNumberedUpwards: whatever the clock says, a later run of the agent has a
// higher number.
func TestRunsAreNumberedUpwards(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	at := time.Unix(1_700_000_000, 0)
	var last uint64
	for i, now := range []time.Time{at, at, at.Add(-time.Hour), time.Unix(-5, 0), at.Add(time.Hour), at.Add(time.Minute)} {
		s, err := openStore(path)
		if err != nil {
			t.Fatal(err)
		}
		run, err := s.nextRun(now)
		if err := errors.Join(err, s.close()); err != nil {
			t.Fatal(err)
		}
		if run <= last || run < uint64(max(now.Unix(), 0)) {
			t.Errorf("run %d, at %s, has number %d after %d", i, now, run, last)
		}
		last = run
	}
}

// TestUpdatesAreInOrder: the newest state of each allocation has the highest revision,
// also when it is sent again.
func TestUpdatesAreInOrder(t *testing.T) {
	first := cluster.Revision(7, 0)
	u := newUpdates(first)
	last := first
	for range 3 {
		u.put(&cluster.Allocation{ID: "a"})
		for range 2 {
			u.newStream()
			_, records := u.next()
			a := new(cluster.Allocation)
			if err := cluster.Unmarshal(records[0], a); err != nil || a.Revision != last+1 {
				t.Fatalf("revision %x (%v) after %x", a.Revision, err, last)
			}
		}
		last++
	}
}

func TestUpdatesAreBoundedAndResent(t *testing.T) {
	u := newUpdates(cluster.Revision(7, 0))
	put := func(id, status string) { u.put(&cluster.Allocation{ID: id, ClientStatus: status}) }
	statuses := func(records [][]byte) string {
		var out []string
		for _, b := range records {
			a := new(cluster.Allocation)
			if err := cluster.Unmarshal(b, a); err != nil {
				t.Fatal(err)
			}
			out = append(out, a.ID+"="+a.ClientStatus)
		}
		return strings.Join(out, " ")
	}
	put("a", "pending")
	put("b", "pending")
	put("a", "running")
	seq, records := u.next()
	if got := statuses(records); got != "a=running b=pending" {
		t.Errorf("first batch %s", got)
	}
	if _, more := u.next(); more != nil {
		t.Errorf("sent twice: %s", statuses(more))
	}
	put("b", "running") // changed while on its way: the acknowledgement is not about this
	u.ack(seq)
	if u.waiting() != 1 {
		t.Errorf("%d wait", u.waiting())
	}
	second, records := u.next()
	if got := statuses(records); got != "b=running" {
		t.Errorf("second batch %s", got)
	}
	u.newStream() // lost with its stream
	third, records := u.next()
	if got := statuses(records); got != "b=running" {
		t.Errorf("after a new stream %s", got)
	}
	u.ack(second) // of the old stream: says nothing
	u.ack(seq)
	if u.waiting() != 1 {
		t.Error("an acknowledgement of an old stream counted")
	}
	u.ack(third)
	if u.waiting() != 0 {
		t.Error("acknowledged, but kept")
	}

	for i := range maxBatchAllocs*(maxUnacked+1) + 1 {
		put(fmt.Sprint(i), "running")
	}
	var seqs []uint64
	for {
		seq, records := u.next()
		if records == nil {
			break
		}
		if len(records) > maxBatchAllocs {
			t.Errorf("a batch of %d", len(records))
		}
		seqs = append(seqs, seq)
	}
	if len(seqs) != maxUnacked {
		t.Errorf("%d batches under way, want %d", len(seqs), maxUnacked)
	}
	u.ack(seqs[0])
	select {
	case <-u.wake:
	default:
		t.Error("nobody is told that there is room")
	}
	if _, records := u.next(); len(records) != maxBatchAllocs {
		t.Errorf("next batch of %d", len(records))
	}
	u.drop("0")
}

func TestCrashReason(t *testing.T) {
	for log, want := range map[string]string{
		"loading\nSIGSEGV: segmentation violation\nPC=0x1 m=0 sigcode=1 addr=0x0\nsignal arrived during cgo execution\n":           "worker ended by signal 11 (segmentation fault)",
		"fatal error: unexpected signal during runtime execution\n[signal SIGBUS: bus error code=0x1]\n\ngoroutine 1 [running]:\n": "worker ended by signal 7 (bus error)",
		"panic: runtime error: invalid memory address\n[signal SIGSEGV: segmentation violation code=0x1]\n":                        "worker crashed: panic: runtime error: invalid memory address",
		"SIGSEGV: segmentation violation\n… restarted\nfatal error: out of memory\n":                                               "worker crashed: fatal error: out of memory",
		"all is well\nSIGNAL: none\n": "",
		"":                            "",
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "m.stderr.3"), []byte(log), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := crashReason(dir, "m.stderr"); got != want {
			t.Errorf("%q: %q, want %q", log, got, want)
		}
	}
	if got := crashReason(t.TempDir(), "m.stderr"); got != "" {
		t.Errorf("without a log: %q", got)
	}
}

func TestTerminatedEvent(t *testing.T) {
	for _, c := range []struct {
		exit  task.Exit
		crash string
		want  string
	}{
		{task.Exit{Code: 3}, "", "Exit Code: 3"},
		{task.Exit{Code: 129, Signal: 1}, "", `Exit Code: 129, Signal: 1, Exit Message: "worker ended by signal 1 (hangup)"`},
		{task.Exit{Code: 137, Signal: 9, OOMKilled: true}, "", `Exit Code: 137, Signal: 9, Exit Message: "worker was killed for exceeding its memory limit"`},
		{task.Exit{Code: 2}, "worker crashed", `Exit Code: 2, Exit Message: "worker crashed"`},
		{task.Exit{Code: -1, Lost: true}, "", `Exit Code: -1, Exit Message: "worker was lost: its supervisor was killed or the machine was restarted"`},
	} {
		if e := terminatedEvent("worker", c.exit, c.crash); e.DisplayMessage != c.want || e.Details["signal"] != fmt.Sprint(c.exit.Signal) {
			t.Errorf("%+v: %s, %v", c.exit, e.DisplayMessage, e.Details)
		}
	}
	state := &cluster.TaskState{}
	for i := range 2 * cluster.MaxTaskEvents {
		addEvent(state, event("n", fmt.Sprint(i)))
	}
	if n := len(state.Events); n != cluster.MaxTaskEvents || state.Events[n-1].DisplayMessage != fmt.Sprint(2*n-1) {
		t.Errorf("%d events, last %s", n, state.Events[n-1].DisplayMessage)
	}
}

func TestLocate(t *testing.T) {
	files := []logFile{{4, 10}, {5, 10}, {6, 5}}
	for _, c := range []struct {
		origin string
		offset int64
		index  int
		at     int64
	}{
		{"start", 0, 4, 0},
		{"start", 9, 4, 9},
		{"start", 10, 5, 0},
		{"start", 25, 6, 5},
		{"start", 99, 6, 5},
		{"start", -1, 4, 0},
		{"end", 0, 6, 5},
		{"end", 5, 6, 0},
		{"end", 6, 5, 9},
		{"end", 25, 4, 0},
		{"end", 99, 4, 0},
	} {
		if index, at := locate(files, c.origin, c.offset); index != c.index || at != c.at {
			t.Errorf("%s %d: %d, %d, want %d, %d", c.origin, c.offset, index, at, c.index, c.at)
		}
	}
}
