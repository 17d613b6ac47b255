package scheduler

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/cron"
)

const (
	// launchWidth bounds the launches that are written side by side, so that those of one
	// time share entries of the log.
	launchWidth = 64
	// maxLaunchWait bounds the wait for the next time: should the clock be set meanwhile, a
	// job is late by no more.
	maxLaunchWait = time.Minute
)

// watchPeriodic launches periodic jobs at their times. How far each has come stands in the
// state, so a new leader launches what was missed, once.
func (s *Scheduler) watchPeriodic(ctx context.Context) error {
	l := newLauncher(func(j *cluster.Job, err error) {
		s.log.Error("a periodic job cannot be launched: its times cannot be read on this server", "job", j.ID, "error", err)
	})
	return s.watchState(ctx, 0, func(snap *cluster.Snapshot, ws cluster.WatchSet) (next cluster.Time) {
		due, next := l.look(snap, ws, now(), newID)
		if !s.launch(ctx, due) {
			next = earliest(next, now().Add(retryLater))
		}
		return next
	})
}

// launch commits what is due; false when some of it could not be.
func (s *Scheduler) launch(ctx context.Context, due []*cluster.LaunchJob) bool {
	var g errgroup.Group
	g.SetLimit(launchWidth)
	for _, cmd := range due {
		g.Go(func() error {
			res, err := s.apply(ctx, cmd)
			log := s.log.With("job", cmd.JobID, "due", cluster.Time(cmd.At).Std().UTC())
			switch {
			case err == nil && res.JobID != "":
				s.metrics.launched.Inc()
				log.Info("periodic job launched", "child", res.JobID, "eval", res.EvalID, "index", res.Index)
			case err == nil:
				log.Info("periodic job let a time pass: what was launched before has not ended")
			case ctx.Err() != nil || cluster.CodeOf(err) == cluster.CodeNotFound || cluster.CodeOf(err) == cluster.CodeInvalid: // it was stopped just now
			default:
				log.Error("a periodic job is due but could not be launched", "error", err)
				return err
			}
			return nil
		})
	}
	return g.Wait() == nil
}

// launcher knows when periodic jobs are due.
type launcher struct {
	jobs   map[cluster.JobKey]*timetable
	broken func(*cluster.Job, error) // told once of a job whose times cannot be read
}

func newLauncher(broken func(*cluster.Job, error)) *launcher {
	return &launcher{jobs: map[cluster.JobKey]*timetable{}, broken: broken}
}

// timetable is the times of one job.
type timetable struct {
	spec  *cluster.PeriodicConfig // that it was made of: records do not change
	times *cron.Schedule          // nil: they cannot be read
	after int64                   // the last launch; -1: not looked at yet
	due   cluster.Time            // the first time after that; 0: none is left
}

// look says what is due now, and when something will be: 0 for never.
func (l *launcher) look(snap *cluster.Snapshot, ws cluster.WatchSet, now cluster.Time, newID func() string) (due []*cluster.LaunchJob, next cluster.Time) {
	snap.Index(ws, cluster.TablePeriodicLaunches)
	jobs := map[cluster.JobKey]*timetable{}
	for _, j := range snap.LaunchingJobs(ws) {
		k := j.Key()
		t := l.jobs[k]
		if t == nil || t.spec != j.Periodic {
			t = l.timetable(j)
		}
		jobs[k] = t
		if t.times == nil {
			continue
		}
		if last := snap.Launch(nil, k).Launch; last != t.after {
			t.after, t.due = last, t.next(cluster.Time(last))
		}
		switch {
		case t.due == 0:
		case t.due > now:
			next = earliest(next, min(t.due, now.Add(maxLaunchWait)))
		default:
			due = append(due, &cluster.LaunchJob{Namespace: j.Namespace, JobID: j.ID, At: int64(t.latest(now)), EvalID: newID()})
		}
	}
	l.jobs = jobs
	return due, next
}

func (l *launcher) timetable(j *cluster.Job) *timetable {
	times, err := cron.Parse(j.Periodic.TimeZone, j.Periodic.Crons()...)
	if err != nil {
		l.broken(j, err)
	}
	return &timetable{spec: j.Periodic, times: times, after: -1}
}

// next is the first time after t; 0: none is left.
func (t *timetable) next(after cluster.Time) cluster.Time {
	due := t.times.Next(after.Std())
	if due.IsZero() {
		return 0
	}
	return cluster.TimeOf(due)
}

// latest is the time to launch for: the one that is due, or now if more than one was missed.
// What is missed is made up for once.
func (t *timetable) latest(now cluster.Time) cluster.Time {
	if second := t.next(t.due); second != 0 && second <= now {
		return now - now%cluster.Time(time.Second)
	}
	return t.due
}
