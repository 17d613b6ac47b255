package scheduler

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/cron"
)

// Metrics is what is measured of allocations and models: soft, and bounded in time.
type Metrics interface {
	// Mean is the average over the last window; false when nothing is known of it in that time. Of what several
	// measure, such as gateways, it is the sum, but of MetricQueueTime the greatest.
	Mean(of, metric string, window time.Duration) (float64, bool)
	// Latest is what was said last, if that is no older; of several who measure, the sum.
	Latest(of, metric string, age time.Duration) (float64, bool)
}

const (
	scaleEvery  = 2 * time.Second  // between looks at the policies
	heldAge     = 5 * time.Second  // for which it counts that requests wait
	idleWindow  = time.Minute      // in which nothing was in flight where all allocations may go
	retryScale  = 30 * time.Second // after the rules refused a count
	maxScaleWhy = 512              // bytes of a reason, far below what events may have
)

// autoscaler is what a leader remembers of the policies.
type autoscaler struct {
	*Scheduler
	began  cluster.Time
	groups map[string]*scaled // by policy ID
}

// scaled is what is remembered of one policy.
type scaled struct {
	wanted  []wanted     // recommendations within the stabilisation window, oldest first
	missing cluster.Time // since then a metric is missing; 0: none is
	told    bool         // of that
	refused string       // why the rules refused the last change
	retry   cluster.Time // not before
}

type wanted struct {
	at    cluster.Time
	count int
}

// autoscale keeps the counts of groups to their policies' checks until ctx ends.
func (s *Scheduler) autoscale(ctx context.Context) error {
	a := &autoscaler{Scheduler: s, began: now(), groups: map[string]*scaled{}}
	s.scalings.Store(&map[string]*cluster.ScalingStatus{})
	defer s.scalings.Store(nil)
	defer s.metrics.scaling.Reset()
	for {
		if err := sleep(ctx, scaleEvery); err != nil {
			return err
		}
		if s.measured != nil {
			a.look(ctx, s.store.State().Snapshot(), now())
		}
	}
}

// ScalingStatus is how the policy of that ID was found at the last look; nil when it was not looked at. It fails with
// CodeNoLeader when this server does not schedule.
func (s *Scheduler) ScalingStatus(id string) (*cluster.ScalingStatus, error) {
	all := s.scalings.Load()
	if all == nil {
		return nil, cluster.Errorf(cluster.CodeNoLeader, "this server does not schedule")
	}
	return (*all)[id], nil
}

func (a *autoscaler) look(ctx context.Context, snap *cluster.Snapshot, now cluster.Time) {
	all, states := map[string]*cluster.ScalingStatus{}, map[string]int{}
	for _, j := range snap.ScaledJobs(nil) {
		for _, g := range j.TaskGroups {
			if g.Scaling == nil || len(g.Scaling.Checks) == 0 || !g.Scaling.Enabled {
				continue
			}
			id := cluster.ScalingPolicyID(j.Key(), g.Name)
			m := a.groups[id]
			if m == nil {
				m = &scaled{}
				a.groups[id] = m
			}
			d := a.act(ctx, j, g, m, decide(m, a.gather(snap, j, g, now)), now)
			all[id] = &cluster.ScalingStatus{State: d.state, Reason: d.reason, Check: d.check, Count: d.count}
			states[d.state]++
		}
	}
	for id := range a.groups {
		if all[id] == nil {
			delete(a.groups, id)
		}
	}
	a.scalings.Store(&all)
	for _, state := range []string{cluster.ScalingSteady, cluster.ScalingChanged, cluster.ScalingHeld, cluster.ScalingMissing} {
		a.metrics.scaling.WithLabelValues(state).Set(float64(states[state]))
	}
}

// observed is what a decision rests on.
type observed struct {
	policy    *cluster.ScalingPolicy
	count     int
	running   int // allocations
	now       cluster.Time
	began     cluster.Time // of this leader: what was before it has not seen
	changed   cluster.Time // the last change of the count by anybody, 0: none is known
	grew      bool         // … was to more
	deploying bool
	held      float64 // requests that wait for a replica
	busy      bool    // requests are in flight, or it is not known that none is
	values    []measured
}

// measured is what one check sees.
type measured struct {
	sum    float64 // over the allocations that told; of MetricHeld: of the group
	told   int     // how many did
	active bool    // of a schedule
}

// decision is what becomes of a count.
type decision struct {
	count  int
	state  string
	check  string // that decided
	reason string
}

// gather measures what the checks of a group ask for.
func (a *autoscaler) gather(snap *cluster.Snapshot, j *cluster.Job, g *cluster.TaskGroup, now cluster.Time) observed {
	o := observed{policy: g.Scaling, count: g.Count, now: now, began: a.began}
	if d := snap.LatestDeployment(nil, j.Key()); d != nil && d.Active() && d.JobCreateIndex == j.CreateIndex {
		o.deploying = true
	}
	if h := snap.Scaling(nil, j.Key()); h != nil && h.Groups[g.Name] != nil {
		for _, e := range h.Groups[g.Name].Events { // newest first
			if e.Count != nil && *e.Count != e.PreviousCount {
				o.changed, o.grew = cluster.Time(e.Time), *e.Count > e.PreviousCount
				break
			}
		}
	}
	var running []string
	for _, alloc := range snap.AllocsByJob(nil, j.Key()) {
		if alloc.TaskGroup == g.Name && alloc.ClientStatus == cluster.AllocClientRunning && !alloc.ServerTerminal() {
			running = append(running, alloc.ID)
		}
	}
	o.running = len(running)
	heldKnown, serves := false, false
	for _, t := range g.Tasks {
		if t.Model != nil {
			held, known := a.measured.Latest(t.Model.Name, cluster.MetricHeld, heldAge)
			o.held, heldKnown, serves = o.held+held, heldKnown || known, true
		}
	}
	if serves {
		o.busy = slices.ContainsFunc(running, func(id string) bool {
			n, known := a.measured.Mean(id, cluster.MetricInFlight, min(idleWindow, g.Scaling.Window))
			return !known || n > 0
		})
	}
	for _, c := range g.Scaling.Checks {
		var v measured
		switch {
		case c.Query == "":
			v.active = runsAt(c, now)
		case c.Query == cluster.MetricHeld && heldKnown:
			v.sum, v.told = o.held, max(g.Count, 1)
		case c.Query == cluster.MetricHeld:
		default:
			for _, id := range running {
				if x, ok := a.measured.Mean(id, c.Query, c.Window); ok {
					v.sum, v.told = v.sum+x, v.told+1
				}
			}
		}
		o.values = append(o.values, v)
	}
	return o
}

// runsAt says whether a schedule that began lasts still.
func runsAt(c *cluster.ScalingCheck, now cluster.Time) bool {
	s, err := cron.Parse(c.TimeZone, c.Start)
	if err != nil {
		return false // jobspec has refused such
	}
	began := s.Next(now.Std().Add(-c.Duration))
	return !began.IsZero() && !began.After(now.Std())
}

// decide makes the next count of a group. Of several checks the greatest count is taken. Up goes at once, down only to what
// would have sufficed in the whole window, which this leader must have seen; a metric that is missing never scales down, and
// no group goes to zero while it has requests.
func decide(m *scaled, o observed) decision {
	want, check, reason, starting, missing := -1, "", "", "", ""
	raise := func(n int, name, format string, args ...any) {
		if n > want {
			want, check, reason = n, name, fmt.Sprintf(format, args...)
		}
	}
	for i, c := range o.policy.Checks {
		v := o.values[i]
		target := float64(c.Target) / 1000
		switch {
		case c.Query == "" && v.active:
			raise(c.Count, c.Name, "check %s: its schedule asks for %d", c.Name, c.Count)
		case c.Query == "":
		case c.Query == cluster.MetricHeld && v.told > 0:
			raise(recommend(c, o.count, v), c.Name, "check %s: %.4g requests wait for a replica, %.4g for each are the target", c.Name, v.sum, target)
		case o.count == 0: // nothing is measured of what does not run
		case v.told > 0:
			raise(recommend(c, o.count, v), c.Name, "check %s: %s is %.4g per allocation, its target %.4g", c.Name, c.Query, v.sum/float64(v.told), target)
		case o.running == 0 && c.Query != cluster.MetricHeld:
			starting = fmt.Sprintf("check %s: none of %d allocations runs yet", c.Name, o.count)
		default:
			missing = fmt.Sprintf("check %s: nothing has told of %s in the last %s", c.Name, c.Query, c.Window)
		}
	}
	if o.held > 0 && o.count == 0 {
		raise(1, "", "requests wait for a replica")
	}
	floor, ceiling := int(o.policy.Min), int(o.policy.Max)
	if want < 0 {
		if want = floor; o.count == 0 && want == 0 {
			reason = "nothing asks for more"
		}
	}
	want = min(max(want, floor), ceiling)
	if want == 0 && o.count > 0 && (o.busy || o.held > 0) {
		want, reason = 1, "the last allocation stays while requests are in flight or wait"
	}
	if missing != "" || starting != "" {
		want = max(want, o.count)
	}

	from := o.now.Add(-o.policy.Window)
	for len(m.wanted) > 0 && m.wanted[0].at < from {
		m.wanted = m.wanted[1:]
	}
	if n := len(m.wanted); n > 0 && m.wanted[n-1].count == want {
		m.wanted = append(m.wanted[:n-1], wanted{o.now, want}) // bounded by changes: the latest of equal ones counts longest
	} else {
		m.wanted = append(m.wanted, wanted{o.now, want})
	}
	stable := want
	for _, w := range m.wanted {
		stable = max(stable, w.count)
	}
	cooldown := o.policy.Cooldown
	if o.grew && o.policy.CooldownUp > 0 {
		cooldown = o.policy.CooldownUp
	}
	recent := func(d time.Duration) bool { return o.changed != 0 && o.now < o.changed.Add(d) }
	waits := ""
	switch {
	case want == o.count:
	case recent(cooldown):
		waits = "the cooldown"
	case o.deploying:
		waits = "a deployment of the job"
	case want > o.count:
		return decision{want, cluster.ScalingChanged, check, reason}
	case o.now < o.began.Add(o.policy.Window):
		waits = "the leader, which has not seen a whole stabilization window yet"
	case stable >= o.count, recent(o.policy.Window):
		waits = "the stabilization window"
	default:
		return decision{stable, cluster.ScalingChanged, check, reason}
	}
	d := decision{o.count, cluster.ScalingSteady, check, reason}
	switch {
	case missing != "":
		d.state, d.check, d.reason = cluster.ScalingMissing, "", missing
	case waits != "":
		d.state, d.reason = cluster.ScalingHeld, fmt.Sprintf("%s; the change to %d waits for %s", reason, want, waits)
	case starting != "":
		d.state, d.check, d.reason = cluster.ScalingHeld, "", starting
	}
	return d
}

// recommend is the count that brings a check's metric to its target. Allocations that the group is to have and that tell
// nothing, as they have no place, just began or cannot be heard, count as idle where more would be asked for and as right at
// their target where less would do: so they neither call for ever more nor let anything go.
func recommend(c *cluster.ScalingCheck, count int, v measured) int {
	target, slack := float64(c.Target)/1000, float64(c.Tolerance)/1000
	silent := float64(max(count-v.told, 0))
	all := (float64(v.told) + silent) * target
	n := count
	switch most := v.sum + silent*target; {
	case v.sum > all*(1+slack), count == 0:
		n = atLeast(v.sum / target)
	case most < all*(1-slack):
		n = atLeast(most / target)
	}
	if c.MaxUp > 0 {
		n = min(n, count+c.MaxUp)
	}
	if c.MaxDown > 0 {
		n = max(n, count-c.MaxDown)
	}
	return max(n, 0)
}

// atLeast is the least whole number that is not less, but for what sums are inexact by.
func atLeast(x float64) int { return int(math.Ceil(min(x-1e-9, math.MaxInt32))) }

// act carries a decision out, and tells once of a metric that is missing for longer than its window. It gives what became
// of the decision.
func (a *autoscaler) act(ctx context.Context, j *cluster.Job, g *cluster.TaskGroup, m *scaled, d decision, now cluster.Time) decision {
	cmd := &cluster.ScaleJob{Namespace: j.Namespace, JobID: j.ID, Group: g.Name, Message: d.reason, JobModifyIndex: j.JobModifyIndex}
	if len(cmd.Message) > maxScaleWhy {
		cmd.Message = strings.ToValidUTF8(cmd.Message[:maxScaleWhy], "")
	}
	if d.state != cluster.ScalingMissing {
		m.missing, m.told = 0, false
	} else if m.missing == 0 {
		m.missing = now
	}
	switch {
	case d.state == cluster.ScalingChanged && now < m.retry:
		return decision{g.Count, cluster.ScalingHeld, d.check, fmt.Sprintf("%s; the change to %d was refused: %s", d.reason, d.count, m.refused)}
	case d.state == cluster.ScalingChanged:
		count := int64(d.count)
		cmd.Count, cmd.EvalID = &count, newID()
		meta, _ := json.Marshal(map[string]string{"rxvision.check": d.check}) // strings only
		cmd.Meta = meta
	case d.state == cluster.ScalingMissing && !m.told && now >= max(m.retry, m.missing.Add(patience(g.Scaling))):
		cmd.Error = true
	default:
		return d
	}
	log := a.log.With("job", j.ID, "namespace", j.Namespace, "group", g.Name)
	_, err := a.store.Apply(ctx, cmd)
	switch {
	case err == nil:
		log.Info("scaling", "from", g.Count, "to", d.count, "state", d.state, "reason", d.reason)
		m.told, m.retry = cmd.Error, 0
	case ctx.Err() == nil && cluster.CodeOf(err) != cluster.CodeConflict: // conflict: the job has just changed
		log.Warn("the count was not changed; it is tried again", "count", d.count, "reason", d.reason, "in", retryScale, "error", err)
		m.refused, m.retry = err.Error(), now.Add(retryScale)
		if cmd.Count != nil {
			return decision{g.Count, cluster.ScalingHeld, d.check, fmt.Sprintf("%s; the change to %d was refused: %v", d.reason, d.count, err)}
		}
	}
	return d
}

// patience is how long a metric may be missing before it is told as an event: what begins has told nothing yet.
func patience(p *cluster.ScalingPolicy) (d time.Duration) {
	for _, c := range p.Checks {
		d = max(d, c.Window)
	}
	return d
}
