package sim

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// How often the dear checks are made, in entries.
const (
	checkEvery   = 100
	hashEvery    = 400
	archiveEvery = 300 // an archive is kept, to be restored one day
	maxArchives  = 4
)

// truth is what an onlooker knows who sees everything: what was committed and
// acknowledged, and what it gave. Servers are measured by it.
type truth struct {
	w        *world
	facts    []*fact // by index, from 1
	commands int     // different requests
	told     uint64  // newest index that anybody was told of
	requests map[string]*fact
	jobs     map[cluster.JobKey]uint64    // JobModifyIndex, as answers gave it
	hashes   map[uint64][sha256.Size]byte // of states, by index
	archives []*image
}

// fact is a committed entry and what the first server that applied it made of it.
type fact struct {
	entry *entry
	res   cluster.Result
	acked bool
	void  bool // a restore took it back
}

func newTruth(w *world) *truth {
	return &truth{w: w, requests: map[string]*fact{}, jobs: map[cluster.JobKey]uint64{}, hashes: map[uint64][sha256.Size]byte{}}
}

// appliedEntry is told of every entry that a server applies.
func (t *truth) appliedEntry(s *server, e *entry, res cluster.Result) {
	switch have := uint64(len(t.facts)); {
	case e.index <= have:
		f := t.facts[e.index-1]
		if f.entry != e {
			t.w.failf("%s applies another entry at %d (term %d) than others did (term %d)", s, e.index, e.term, f.entry.term)
			return
		}
		if !reflect.DeepEqual(f.res, res) {
			t.w.failf("%s applies %s at %d and gets %+v; the first server got %+v", s, kindName(e.req.cmd), e.index, res, f.res)
			return
		}
	case e.index > have+1:
		t.w.failf("%s applies %d, but nobody has applied %d", s, e.index, have+1)
		return
	default:
		t.learn(s, e, res)
	}
	if e.index%hashEvery == 0 || e.restore != nil {
		t.compareHash(s)
	}
}

// learn takes a new fact.
func (t *truth) learn(s *server, e *entry, res cluster.Result) {
	f := &fact{entry: e, res: res}
	t.facts = append(t.facts, f)
	switch {
	case e.restore != nil:
		t.restored(s, e)
	case e.req == nil:
	case t.requests[e.req.id] != nil:
		t.w.coverage.Retries++
		if first := t.requests[e.req.id]; !reflect.DeepEqual(first.res, res) {
			t.w.failf("%s came to the log at %d and again at %d; it gave %+v and then %+v", kindName(e.req.cmd), first.entry.index, e.index, first.res, res)
		}
		if high := s.state.Snapshot().Index(nil); high >= e.index {
			t.w.failf("%s came to the log again at %d and changed the state, which has index %d", kindName(e.req.cmd), e.index, high)
		}
	default:
		t.commands++
		t.requests[e.req.id] = f
		e.req.facts = append(e.req.facts, f)
		t.judge(s, e.req.cmd, res)
		kind := kindName(e.req.cmd)
		o := t.w.coverage.Kinds[kind]
		if res.Err != nil {
			o.Refused++
		} else {
			o.Done++
		}
		t.w.coverage.Kinds[kind] = o
		t.w.note("%d %s %s", e.index, kind, summary(e.req.cmd, res))
		if t.commands%checkEvery == 0 {
			t.check(s)
		}
		if t.commands%archiveEvery == 0 {
			t.archives = append(t.archives, &image{index: e.index, term: e.term, state: s.state.Snapshot()})
			t.archives = t.archives[max(0, len(t.archives)-maxArchives):]
		}
	}
}

func summary(c cluster.Command, res cluster.Result) string {
	if res.Err != nil {
		return "refused: " + res.Err.Text
	}
	switch c := c.(type) {
	case *cluster.RegisterNode:
		return c.Node.Name
	case *cluster.RegisterJob:
		return fmt.Sprintf("%s version %d", c.Job.ID, res.Version)
	case *cluster.DeregisterJob:
		return fmt.Sprintf("%s purge %t", c.JobID, c.Purge)
	case *cluster.DispatchJob, *cluster.LaunchJob:
		return res.JobID
	case *cluster.ApplyPlans:
		place, stop, refused, stale := 0, 0, 0, 0
		for i, p := range c.Plans {
			place, stop, refused = place+len(p.Place), stop+len(p.Stop), refused+len(res.Plans[i].Refused)
			if res.Plans[i].Stale {
				stale++
			}
		}
		return fmt.Sprintf("%d plans, %d placed, %d stopped, %d nodes refused, %d stale", len(c.Plans), place, stop, refused, stale)
	case *cluster.UpdateAllocs:
		return fmt.Sprintf("%d allocations", len(c.Allocs))
	case *cluster.UpdateNodeStatus:
		return fmt.Sprint(c.Updates)
	}
	return ""
}

// judge holds answers about jobs against each other: a compare-and-set succeeds
// if, and only if, it names the job as the last answer left it.
func (t *truth) judge(s *server, c cluster.Command, res cluster.Result) {
	switch c := c.(type) {
	case *cluster.RegisterJob:
		k := c.Job.Key()
		have := t.jobs[k]
		conflict := res.Err != nil && res.Err.Code == cluster.CodeConflict
		if c.EnforceIndex {
			switch {
			case conflict && have == c.JobModifyIndex:
				t.w.failf("a compare-and-set of job %s at %d was refused, though it is at %d: %v", k.ID, c.JobModifyIndex, have, res.Err)
			case res.Err == nil && have != c.JobModifyIndex:
				t.w.failf("a compare-and-set of job %s at %d succeeded, though it was at %d", k.ID, c.JobModifyIndex, have)
			case conflict:
				t.w.coverage.Conflicts++
			case res.Err == nil:
				t.w.coverage.Swaps++
			}
		}
		if res.Err == nil {
			t.jobs[k] = res.JobModifyIndex
		}
	case *cluster.DeregisterJob:
		k := cluster.JobKey{Namespace: c.Namespace, ID: c.JobID}
		if _, known := t.jobs[k]; known != (res.JobModifyIndex != 0) {
			t.w.failf("the end of job %s gave %+v; that it exists: %t", k.ID, res, known)
		}
		if c.Purge {
			delete(t.jobs, k)
		} else if res.JobModifyIndex != 0 {
			t.jobs[k] = res.JobModifyIndex
		}
	case *cluster.ApplyPlans:
		for i, p := range c.Plans {
			t.planned(s, p, res.Plans[i])
		}
	case *cluster.DispatchJob:
		t.spawned(c.Namespace, res)
	case *cluster.LaunchJob:
		t.spawned(c.Namespace, res)
	case *cluster.SetAlias, *cluster.Reap, *cluster.ScaleJob, *cluster.UpdateDeployment, *cluster.UpdateAllocs: // a deployment that fails takes its job back
		t.readJobs(s)
	}
}

// movedBy says whether a plan gives an allocation that may be moved a claim on another place.
func movedBy(p *cluster.Plan, a *cluster.Allocation, job *cluster.Job) bool {
	g := job.Group(a.TaskGroup)
	return g.Gang == nil && g.Preempt != nil && g.Preempt.Move && slices.ContainsFunc(p.Evals, func(e *cluster.Evaluation) bool {
		return e.JobKey() == a.JobKey() && slices.ContainsFunc(e.Claims, func(c *cluster.Claim) bool { return c.Name == a.Name && c.NodeID != a.NodeID })
	})
}

// planned looks whether what a plan does to gangs it does to all members: those that it places, and
// those that it preempts.
func (t *truth) planned(s *server, p *cluster.Plan, res cluster.PlanResult) {
	snap := s.state.Snapshot()
	for _, group := range p.Gangs {
		placed, members := 0, 0
		for _, a := range p.Place {
			if a.TaskGroup == group {
				members++
				if snap.Alloc(nil, a.ID) != nil {
					placed++
				}
			}
		}
		if placed != 0 && placed != members {
			t.w.failf("of gang %s of job %s %d members were placed, of %d", group, p.JobID, placed, members)
		}
		if placed > 0 {
			t.w.coverage.Gangs++
		}
	}
	for _, stop := range p.Stop {
		a := snap.Alloc(nil, stop.AllocID)
		if stop.PreemptedBy == "" || res.Stale || a == nil || a.PreemptedByAllocation != stop.PreemptedBy {
			continue
		}
		t.w.coverage.Preempted++
		mine, theirs := snap.JobVersion(nil, cluster.JobKey{Namespace: p.Namespace, ID: p.JobID}, p.JobVersion), snap.JobVersion(nil, a.JobKey(), a.JobVersion)
		if mine != nil && theirs != nil && theirs.CreateIndex == a.JobCreateIndex && theirs.Priority <= mine.Priority && movedBy(p, a, theirs) {
			t.w.coverage.Moved++
			continue
		}
		if mine != nil && theirs != nil && theirs.CreateIndex == a.JobCreateIndex && theirs.Priority+place.PriorityGap > mine.Priority {
			t.w.failf("job %s of priority %d has preempted %s of priority %d%s%s", mine.ID, mine.Priority, a.Name, theirs.Priority, story(snap, mine.Key()), story(snap, a.JobKey()))
		}
		if theirs == nil || theirs.CreateIndex != a.JobCreateIndex || theirs.Group(a.TaskGroup).Gang == nil {
			continue
		}
		for _, m := range snap.AllocsByJob(nil, a.JobKey()) {
			if m.TaskGroup == a.TaskGroup && m.JobVersion == a.JobVersion && m.JobCreateIndex == a.JobCreateIndex && !m.Terminal() {
				t.w.failf("%s of a gang was preempted, %s was not%s", a.Name, m.Name, story(snap, a.JobKey()))
			}
		}
	}
}

// spawned is told of a child that an answer names.
func (t *truth) spawned(namespace string, res cluster.Result) {
	if res.JobID != "" {
		t.jobs[cluster.JobKey{Namespace: namespace, ID: res.JobID}] = res.JobModifyIndex
	}
}

// readJobs takes over what changed jobs without an answer of each.
func (t *truth) readJobs(s *server) { t.jobs = jobIndexes(s) }

func jobIndexes(s *server) map[cluster.JobKey]uint64 {
	jobs := map[cluster.JobKey]uint64{}
	for _, j := range s.state.Snapshot().Jobs(nil, "*", "") {
		jobs[j.Key()] = j.JobModifyIndex
	}
	return jobs
}

// restored takes back what the archive does not hold.
func (t *truth) restored(s *server, e *entry) {
	t.w.note("%d the state at %d is restored", e.index, e.restore.index)
	for _, f := range t.facts[e.restore.index:e.index] {
		if f.entry.req != nil {
			f.void = true
			if t.requests[f.entry.req.id] == f {
				delete(t.requests, f.entry.req.id)
			}
		}
	}
	t.archives = slices.DeleteFunc(t.archives, func(i *image) bool { return i.index > e.restore.index })
	t.readJobs(s)
	t.check(s)
}

// acknowledged is told of every answer that its asker got: it must be what the
// log gave, and newer than whatever was known when the request was made.
func (t *truth) acknowledged(r *request, res cluster.Result) {
	for _, f := range r.facts {
		if !reflect.DeepEqual(f.res, res) {
			continue
		}
		if res.Index <= r.floor {
			t.w.failf("%s was answered with index %d, though %d was known when it was sent", kindName(r.cmd), res.Index, r.floor)
		}
		f.acked = true
		t.told = max(t.told, res.Index)
		return
	}
	t.w.failf("%s was answered with %+v, which the log never gave", kindName(r.cmd), res)
}

// loaded is told of every state that was made from records.
func (t *truth) loaded(s *server) {
	if s.image.hash == nil {
		h := s.image.state.Hash()
		s.image.hash = &h
	}
	if got, want := s.state.Snapshot().Hash(), *s.image.hash; got != want {
		t.w.failf("%s: the state restored from the snapshot at %d hashes to %x, its origin to %x", s, s.image.index, got, want)
	}
	t.w.coverage.Hashes++
}

// compareHash compares the state with that of the first server at this index.
func (t *truth) compareHash(s *server) {
	got, sums := shortHash(s.state.Snapshot(), s.sums)
	s.sums = sums
	want, known := t.hashes[s.applied]
	if !known {
		t.hashes[s.applied] = got
		return
	}
	t.w.coverage.Hashes++
	if got != want {
		t.w.failf("%s: the state at %d hashes to %x, on the first server that came there to %x", s, s.applied, got, want)
	}
}

func (t *truth) check(s *server) {
	t.w.coverage.Checks++
	if err := s.state.Snapshot().Check(); err != nil {
		t.w.failf("%s at %d: %w", s, s.applied, err)
	}
}

// recordSums are hashes of records, which may lie in two tables.
type recordSums map[tableRecord][sha256.Size]byte

type tableRecord struct {
	table  *cluster.Table
	record any
}

// shortHash is a hash over all records but those of kept results, which are many. sums
// has that of each record, from one time to the next: a record never changes.
func shortHash(snap *cluster.Snapshot, sums recordSums) (_ [sha256.Size]byte, now recordSums) {
	all := sha256.New()
	now = make(recordSums, len(sums))
	var b []byte
	err := snap.Records(func(t *cluster.Table, key string, record any) error {
		if t.Name == cluster.TableResults {
			return nil
		}
		at := tableRecord{t, record}
		sum, known := sums[at]
		if !known || t.Name == cluster.TableIndex { // whose entries are no records
			b = cluster.AppendStored(append(b[:0], key...), record)
			sum = sha256.Sum256(b)
		}
		now[at] = sum
		all.Write(sum[:])
		return nil
	})
	if err != nil {
		panic(err) // the function above never fails
	}
	return [sha256.Size]byte(all.Sum(nil)), now
}

// lastChecks are made when all has drained: servers are alike to the last byte and
// hold every answer that was given.
func (w *world) lastChecks() error {
	t, first := w.truth, w.servers[0]
	want := first.state.Snapshot().Hash()
	for _, s := range w.servers {
		if s.applied != first.applied {
			return fmt.Errorf("%s has applied %d, %s %d", s, s.applied, first, first.applied)
		}
		if got := s.state.Snapshot().Hash(); got != want {
			return fmt.Errorf("the state at %d hashes to %x on %s, to %x on %s", s.applied, got, s, want, first)
		}
		w.coverage.Hashes++
		if err := s.state.Snapshot().Check(); err != nil {
			return fmt.Errorf("%s at the end: %w", s, err)
		}
		w.coverage.Checks++
	}
	w.note("all states hash to %x", want)
	if got := jobIndexes(first); !maps.Equal(got, t.jobs) {
		return fmt.Errorf("jobs are at %v, answers left them at %v", got, t.jobs)
	}
	kept := map[string][]byte{}
	err := first.state.Snapshot().Records(func(tab *cluster.Table, _ string, record any) error {
		if tab.Name != cluster.TableResults {
			return nil
		}
		var r struct {
			RequestID string
			Result    cluster.Result
		}
		if err := cluster.Unmarshal(cluster.Marshal(record), &r); err != nil {
			return err
		}
		kept[r.RequestID] = cluster.Marshal(&r.Result)
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(t.requests)) {
		f := t.requests[id]
		if got, ok := kept[id]; !ok || !bytes.Equal(got, cluster.Marshal(&f.res)) {
			return fmt.Errorf("%s at %d (acknowledged: %t) has left no trace, or another: %+v", kindName(f.entry.req.cmd), f.entry.index, f.acked, f.res)
		}
	}
	for _, f := range t.facts {
		if f.acked && !f.void && t.requests[f.entry.req.id] == nil {
			return fmt.Errorf("%s at %d was acknowledged and is lost", kindName(f.entry.req.cmd), f.entry.index)
		}
	}
	return nil
}
