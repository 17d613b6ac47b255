package scheduler

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	_ "time/tzdata" // the machine may lack it

	"github.com/rxvision/rxvision/cluster"
)

// every makes a job periodic.
func every(cron string, change ...func(*cluster.PeriodicConfig)) func(*cluster.Job) {
	return func(j *cluster.Job) {
		batch(j)
		j.Periodic = &cluster.PeriodicConfig{Enabled: true, SpecType: cluster.PeriodicSpecCron, Spec: cron, TimeZone: "UTC"}
		for _, c := range change {
			c(j.Periodic)
		}
	}
}

func careful(p *cluster.PeriodicConfig) { p.ProhibitOverlap = true }

// wantLaunched compares the children of job per with the times that they were launched for.
func (w *world) wantLaunched(times ...time.Time) {
	w.t.Helper()
	var want, got []string
	for _, at := range times {
		want = append(want, fmt.Sprintf("per/periodic-%d", at.Unix()))
	}
	for _, j := range w.settle().Children(nil, key("per")) {
		got = append(got, j.ID)
	}
	if slices.Sort(want); !slices.Equal(got, want) {
		w.t.Fatalf("at %s these are launched: %v\nwant %v", now().Std().Format(time.DateTime), got, want)
	}
}

// complete ends all that runs.
func (w *world) complete() {
	for _, a := range w.agents().Allocs(nil, "") {
		if !a.ClientTerminal() {
			w.say(a, cluster.AllocClientComplete, true)
		}
	}
	w.agents()
}

func TestLaunchedAtItsTimes(t *testing.T) {
	inWorld(t, func(w *world) {
		start := time.Now()
		hour := func(n int) time.Time { return start.Add(time.Duration(n) * time.Hour) }
		w.node("n1", 0)
		w.run(service("per", 1, every("0 * * * *")))
		time.Sleep(time.Hour - time.Second)
		w.wantLaunched()
		w.wantLive(w.settle(), "per", 0)
		time.Sleep(time.Second)
		w.wantLaunched(hour(1))
		w.wantLive(w.settle(), fmt.Sprintf("per/periodic-%d", hour(1).Unix()), 1)
		time.Sleep(2*time.Hour + 5*time.Minute)
		w.wantLaunched(hour(1), hour(2), hour(3))

		// Other times count from now on; a job that is disabled or stopped lets its own pass for good.
		w.run(service("per", 1, every("*/10 * * * *")))
		time.Sleep(6 * time.Minute)
		ten := hour(3).Add(10 * time.Minute)
		w.wantLaunched(hour(1), hour(2), hour(3), ten)
		w.run(service("per", 1, every("*/10 * * * *", func(p *cluster.PeriodicConfig) { p.Enabled = false })))
		time.Sleep(25 * time.Minute)
		w.wantLaunched(hour(1), hour(2), hour(3), ten)
		w.run(service("per", 1, every("0 * * * *")))
		w.must(&cluster.DeregisterJob{Namespace: cluster.DefaultNamespace, JobID: "per"})
		time.Sleep(3 * time.Hour)
		w.wantLaunched(hour(1), hour(2), hour(3), ten)
		w.run(service("per", 1, every("0 * * * *")))
		time.Sleep(time.Minute)
		w.wantLaunched(hour(1), hour(2), hour(3), ten)
		time.Sleep(time.Hour)
		w.wantLaunched(hour(1), hour(2), hour(3), ten, hour(7))
		w.must(&cluster.DeregisterJob{Namespace: cluster.DefaultNamespace, JobID: "per", Purge: true})
		time.Sleep(2 * time.Hour)
		w.wantLaunched(hour(1), hour(2), hour(3), ten, hour(7))
	})
}

// TestMissedTimesAreMadeUpForOnce: a new leader launches what is due, once, for the time that
// was missed, or for now if there were several.
func TestMissedTimesAreMadeUpForOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		start := time.Now()
		w.run(service("per", 1, every("0 * * * *")))
		w.settle()
		w.lead(false)
		time.Sleep(90 * time.Minute)
		w.wantLaunched()
		w.lead(true)
		one := start.Add(time.Hour)
		w.wantLaunched(one)
		w.lead(false)
		w.settle()
		time.Sleep(48 * time.Hour)
		w.lead(true)
		several := time.Now()
		w.wantLaunched(one, several)
		time.Sleep(29 * time.Minute)
		w.wantLaunched(one, several)
		time.Sleep(time.Minute)
		w.wantLaunched(one, several, start.Add(50*time.Hour))
	})
}

// TestTwoLeadersLaunchOnce: a leader that does not know yet that it is none launches nothing twice.
func TestTwoLeadersLaunchOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		stop := startScheduler(t, w.memStore, Config{})
		defer stop()
		start := time.Now()
		w.run(service("per", 1, every("*/5 * * * *")))
		time.Sleep(16 * time.Minute)
		w.wantLaunched(start.Add(5*time.Minute), start.Add(10*time.Minute), start.Add(15*time.Minute))
	})
}

func TestOverlap(t *testing.T) {
	inWorld(t, func(w *world) {
		start := time.Now()
		minutes := func(n int) time.Time { return start.Add(time.Duration(n) * time.Minute) }
		w.node("n1", 0)
		w.run(service("per", 1, every("*/10 * * * *", careful)))
		time.Sleep(35 * time.Minute)
		w.wantLaunched(minutes(10))
		w.complete()
		time.Sleep(time.Minute)
		w.wantLaunched(minutes(10)) // what passed is not made up for
		time.Sleep(5 * time.Minute)
		w.wantLaunched(minutes(10), minutes(40))
		if res := w.must(&cluster.LaunchJob{Namespace: cluster.DefaultNamespace, JobID: "per", EvalID: newID()}); res.JobID == "" {
			t.Fatal("by hand nothing was launched")
		}
		w.wantLaunched(minutes(10), minutes(40), minutes(41))
		w.agents()
		w.lead(false)
		time.Sleep(time.Hour)
		w.lead(true)
		w.wantLaunched(minutes(10), minutes(40), minutes(41)) // nor by a new leader while it runs
	})
}

// TestClocksGoBack: a time that a zone has twice comes twice. Sydney's clocks went from 03:00
// to 02:00 on 26 March 2000.
func TestClocksGoBack(t *testing.T) {
	inWorld(t, func(w *world) {
		time.Sleep(time.Until(time.Date(2000, 3, 24, 20, 0, 0, 0, time.UTC)))
		w.run(service("per", 1, every("30 2 * * *", func(p *cluster.PeriodicConfig) { p.TimeZone = "Australia/Sydney" })))
		first := time.Date(2000, 3, 25, 15, 30, 0, 0, time.UTC)
		time.Sleep(time.Until(first.Add(30 * time.Minute)))
		w.wantLaunched(first)
		time.Sleep(time.Hour)
		w.wantLaunched(first, first.Add(time.Hour))
		time.Sleep(time.Until(first.Add(26 * time.Hour)))
		w.wantLaunched(first, first.Add(time.Hour), first.Add(25*time.Hour))
	})
}

// TestManyAtOneTime: jobs with the same times are launched together, and one whose times this
// server cannot read does not hold up the others.
func TestManyAtOneTime(t *testing.T) {
	inWorld(t, func(w *world) {
		w.check = false
		const jobs = 3 * launchWidth
		for i := range jobs {
			w.run(service(fmt.Sprintf("job%d", i), 1, every("@hourly")))
		}
		w.run(service("odd", 1, every("@hourly", func(p *cluster.PeriodicConfig) { p.TimeZone = "Mars/Olympus" })))
		time.Sleep(time.Hour)
		snap := w.settle()
		for i := range jobs {
			if n := len(snap.Children(nil, key(fmt.Sprintf("job%d", i)))); n != 1 {
				t.Fatalf("job%d was launched %d times", i, n)
			}
		}
		if n := len(snap.Children(nil, key("odd"))); n != 0 {
			t.Errorf("a job of unknown times was launched %d times", n)
		}
	})
}

// TestLaunchIsTriedAgain: what the store cannot take for a while is launched when it can.
func TestLaunchIsTriedAgain(t *testing.T) {
	inWorld(t, func(w *world) {
		start := time.Now()
		var full atomic.Bool
		full.Store(true)
		w.before = func(cmd cluster.Command) error {
			if _, ok := cmd.(*cluster.LaunchJob); ok && full.Load() {
				return cluster.Errorf(cluster.CodeUnavailable, "the disk is full")
			}
			return nil
		}
		w.run(service("per", 1, every("@hourly")))
		time.Sleep(61 * time.Minute)
		w.wantLaunched()
		full.Store(false)
		time.Sleep(maxBackoff)
		w.wantLaunched(start.Add(time.Hour))
	})
}

// TestStepsLaunch: simulation sees the same decisions.
func TestStepsLaunch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemStore(t)
		s.run(service("per", 1, every("@hourly")))
		steps := NewSteps(Retention{}, newID)
		if cmds := steps.Watch(s.State().Snapshot(), now()); len(cmds) > 0 {
			t.Fatalf("at once: %+v", cmds)
		}
		due := now().Add(time.Hour)
		for range 2 {
			cmds := steps.Watch(s.State().Snapshot(), due.Add(time.Second))
			if len(cmds) != 1 || cmds[0].(*cluster.LaunchJob).At != int64(due) {
				t.Fatalf("after an hour: %+v", cmds)
			}
		}
		if _, err := s.Apply(context.Background(), steps.Watch(s.State().Snapshot(), due)[0]); err != nil {
			t.Fatal(err)
		}
		if cmds := steps.Watch(s.State().Snapshot(), due.Add(time.Second)); len(cmds) > 0 {
			t.Fatalf("launched, and again: %+v", cmds)
		}
	})
}

// TestChildrenAreCollected: a child leaves as any batch job does, by age or by count; its parent stays.
func TestChildrenAreCollected(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("par", 1, batch, func(j *cluster.Job) {
			j.ParameterizedJob = &cluster.ParameterizedJobConfig{Payload: cluster.PayloadOptional}
			*j.TaskGroups[0].Tasks[0].Resources = cluster.Resources{CPU: 1, MemoryMB: 1}
		}))
		dispatch := func(n int) {
			for range n {
				w.must(&cluster.DispatchJob{Namespace: cluster.DefaultNamespace, JobID: "par", EvalID: newID()})
			}
		}
		want := func(children int, dead int64) {
			t.Helper()
			snap := w.settle()
			c := snap.Summary(nil, key("par")).Children
			if n := len(snap.Children(nil, key("par"))); n != children || c.Dead != dead || snap.Job(nil, key("par")) == nil {
				t.Fatalf("%d children are kept, want %d; %+v", n, children, *c)
			}
		}
		dispatch(10)
		w.complete()
		time.Sleep(time.Hour)
		dispatch(5)
		w.complete()
		dispatch(1)
		w.agents()
		want(16, 15)
		w.lead(false)
		w.collected(Retention{MaxEndedJobs: 12}, 2)
		want(6, 15)
		w.collected(Retention{MaxEndedJobs: 1}, 2) // those that ended last stay, and what runs
		want(6, 15)
		w.lead(true)
		time.Sleep(5 * time.Hour)
		want(1, 15)
		w.complete()
		w.must(&cluster.DeregisterJob{Namespace: cluster.DefaultNamespace, JobID: "par"})
		time.Sleep(5 * time.Hour)
		if snap := w.settle(); snap.Job(nil, key("par")) != nil || len(snap.Children(nil, key("par"))) > 0 {
			t.Error("a stopped parent is kept, or its last child")
		}
	})
}
