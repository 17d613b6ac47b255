package sim

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Timers of the simulated log.
const (
	heartbeatEvery  = 50 * time.Millisecond
	electionTimeout = 300 * time.Millisecond // to twice that, without word of a leader
	leaseTimeout    = 400 * time.Millisecond // of a leader without word of a majority
	resendAfter     = 150 * time.Millisecond // of entries without an answer
	appendEntries   = 64                     // in one message
	applyEntries    = 32                     // in one event
	trailingEntries = 40                     // kept behind a snapshot
)

// entry is one entry of the log. Without a request it begins a term, or replaces
// the whole state.
type entry struct {
	index, term uint64
	req         *request
	restore     *image
}

// image is a state as records, as a snapshot file or an archive holds it.
type image struct {
	index, term uint64
	state       *cluster.Snapshot  // immutable; turned into records when it is read
	hash        *[sha256.Size]byte // of state, once it was needed
}

type role int

const (
	follower role = iota
	leader
)

// server is one server: a disk, a log, a state, and on the leader the leader's work.
type server struct {
	w    *world
	id   int
	addr address
	life int // counts starts; what was meant for an earlier one is dropped

	// On the disk.
	term   uint64
	log    []*entry // behind the snapshot's index
	synced uint64   // up to which entry a crash loses nothing
	image  *image   // nil: none yet
	full   bool

	// In memory.
	up, paused bool
	role       role
	leader     int // -1: unknown
	heard      int64
	state      *cluster.State
	sums       recordSums // of the state's records, when it was hashed last
	applied    uint64
	appliedIn  uint64 // term of the entry at applied
	commit     uint64
	applying   bool
	peers      []peer
	waiting    map[uint64]waiter
	flushing   bool
	reign      *reign
	sessions   map[string]*session // by node ID
	heardOf    map[string]int64    // when a node was last heard of here, by its ID
	reports    []report
	reporting  bool // an entry of reports is on its way, or about to be

	skew      time.Duration // of its clock
	lag       time.Duration // before it applies what is committed
	slow      time.Duration // of its disk, in addition
	sinceSnap int
}

// peer is what a leader knows of another server.
type peer struct {
	match, next uint64 // up to which it is known to agree; what to send next
	sentAt      int64  // 0: nothing under way
	heard       int64
}

// waiter wants to know what became of an entry.
type waiter struct {
	term  uint64
	reply func(cluster.Result, error)
}

func newServer(w *world, id int) *server {
	return &server{w: w, id: id, addr: address(id), leader: -1}
}

func (s *server) String() string { return fmt.Sprintf("s%d", s.id) }

// clock is what the server takes for the time.
func (s *server) clock() cluster.Time { return cluster.Time(s.w.now + int64(s.skew)) }

// alive guards what a server is to do later against its death and pauses: paused,
// it does it when it wakes.
func (s *server) alive(do func()) func() {
	life := s.life
	var run func()
	run = func() {
		switch {
		case !s.up || s.life != life:
		case s.paused:
			s.w.after(heartbeatEvery, run)
		default:
			do()
		}
	}
	return run
}

func (s *server) after(d time.Duration, do func()) { s.w.after(d, s.alive(do)) }

// every repeats something for as long as the server lives.
func (s *server) every(d time.Duration, do func()) {
	s.after(d, func() { do(); s.every(d, do) })
}

// boot starts the server from its disk.
func (s *server) boot() {
	s.life++
	s.up, s.paused, s.role, s.leader, s.heard = true, false, follower, -1, s.w.now
	s.state, s.sums, s.applied, s.appliedIn, s.commit, s.applying, s.flushing = cluster.NewState(), nil, 0, 0, 0, false, false
	s.waiting, s.sessions, s.heardOf, s.sinceSnap = map[uint64]waiter{}, map[string]*session{}, map[string]int64{}, 0
	s.peers = make([]peer, len(s.w.servers))
	if s.image != nil {
		s.load(s.image, nil)
		s.w.truth.loaded(s)
	}
	s.w.note("%s starts at %d, log to %d, term %d", s, s.applied, s.last(), s.term)
	s.every(s.w.between(40*time.Millisecond, 60*time.Millisecond), s.watchLeader)
	s.every(sessionPoll, s.pollSessions)
	s.every(tellEvery, s.tellLeader)
	s.reports, s.reporting = nil, false
}

// crash loses memory and what the disk had not promised, or only a part of that.
func (s *server) crash() {
	kept := s.synced
	if tail := s.last() - s.synced; tail > 0 {
		kept += uint64(s.w.rnd.Int64N(int64(tail) + 1))
		s.w.coverage.fault("unsynced tail lost")
	}
	s.w.note("%s crashes at %d, log to %d of %d", s, s.applied, kept, s.last())
	s.up = false
	s.stepDown("crash")
	s.log = s.log[:kept-s.base()]
	s.synced = min(s.synced, kept)
	s.state.Abandon()
	for _, sess := range s.attached() {
		sess.stream.reset()
	}
}

// load replaces the state by an image's records, as they would come from a file.
// What live, if given, knows of servers stays: an archive brings jobs only.
func (s *server) load(i *image, live *cluster.Snapshot) {
	r := cluster.NewRestore()
	var b []byte
	err := i.state.Records(func(t *cluster.Table, _ string, record any) error {
		b = cluster.AppendStored(b[:0], record)
		if live != nil && cluster.OfMembership(t, b) {
			return nil
		}
		return r.Add(t, b)
	})
	if live != nil {
		err = errors.Join(err, live.Membership(r.Add))
	}
	var state *cluster.State
	if err == nil {
		state, err = r.Done()
	}
	if err != nil {
		s.w.failf("%s restores the state at %d: %w", s, i.index, err)
		return
	}
	s.state.Abandon()
	s.state, s.sums, s.applied, s.appliedIn = state, nil, i.index, i.term
	s.commit = max(s.commit, i.index)
}

// base is the index before the first entry of the log.
func (s *server) base() uint64 {
	if len(s.log) > 0 {
		return s.log[0].index - 1
	}
	if s.image != nil {
		return s.image.index
	}
	return 0
}

func (s *server) last() uint64 { return s.base() + uint64(len(s.log)) }

// at is the entry of an index, nil when the log does not hold it.
func (s *server) at(index uint64) *entry {
	if base := s.base(); index > base && index <= base+uint64(len(s.log)) {
		return s.log[index-base-1]
	}
	return nil
}

// termAt is the term of an index, as far as it is known.
func (s *server) termAt(index uint64) (uint64, bool) {
	switch e := s.at(index); {
	case e != nil:
		return e.term, true
	case index == 0:
		return 0, true
	case s.image != nil && s.image.index == index:
		return s.image.term, true
	}
	return 0, false
}

// write adds entries to the log and has them on the disk some time later; done
// comes then.
func (s *server) write(entries []*entry, done func()) {
	s.log = append(s.log, entries...)
	end := entries[len(entries)-1]
	s.after(20*time.Microsecond+s.w.upTo(s.w.weather.fsync)+s.w.upTo(s.slow), func() {
		if s.at(end.index) == end || end.index <= s.base() { // not cut off meanwhile
			s.synced = max(s.synced, end.index)
			done()
		}
	})
}

// watchLeader asks to lead when no leader is heard of, and stops leading without
// a majority.
func (s *server) watchLeader() {
	w := s.w
	if s.role == leader {
		heard := 1
		for i := range s.peers {
			if i != s.id && w.now-s.peers[i].heard < int64(leaseTimeout) {
				heard++
			}
		}
		if heard < w.majority() {
			s.stepDown("lost its majority")
			return
		}
		s.flush(true)
		return
	}
	if w.now-s.heard > int64(w.between(electionTimeout, 2*electionTimeout)) {
		s.elect()
	}
}

func (w *world) majority() int { return len(w.servers)/2 + 1 }

// elect asks all servers for their vote, at one moment. Whoever votes has raised
// its term on its disk and takes nothing from older leaders.
func (s *server) elect() {
	w := s.w
	s.leader = -1
	if s.full {
		return
	}
	term, votes := s.term, []*server{s}
	for _, p := range w.servers {
		if p == s || !p.up || p.paused || p.full || !w.net.both(s.addr, p.addr) || w.chance(50) {
			continue
		}
		if p.role == leader || w.now-p.heard < int64(electionTimeout) || p.newer(s) {
			continue // it has a leader, or knows more
		}
		votes = append(votes, p)
		term = max(term, p.term)
	}
	if len(votes) < w.majority() {
		return
	}
	for _, p := range votes {
		p.term, p.heard, p.leader = term+1, w.now, s.id
	}
	s.lead()
}

// newer says whether this server's log is ahead of the other's.
func (s *server) newer(than *server) bool {
	a, _ := s.termAt(s.last())
	b, _ := than.termAt(than.last())
	return a > b || a == b && s.last() > than.last()
}

// lead begins a reign. Its first entry commits those of earlier terms.
func (s *server) lead() {
	w := s.w
	w.note("%s leads term %d, log to %d, committed %d", s, s.term, s.last(), s.commit)
	w.coverage.Elections++
	s.role, s.leader = leader, s.id
	for i := range s.peers {
		s.peers[i] = peer{heard: w.now, next: s.last() + 1}
	}
	s.append(&entry{})
}

// stepDown ends a reign; whoever waits for an entry does not learn what becomes of it.
func (s *server) stepDown(why string) {
	if s.reign != nil {
		s.reign.end()
		s.reign = nil
	}
	if s.role != leader {
		return
	}
	s.w.note("%s follows again: %s", s, why)
	s.role, s.leader, s.heard = follower, -1, s.w.now
	indexes := make([]uint64, 0, len(s.waiting))
	for i := range s.waiting {
		indexes = append(indexes, i)
	}
	slices.Sort(indexes)
	for _, i := range indexes {
		reply := s.waiting[i].reply
		delete(s.waiting, i)
		reply(cluster.Result{}, errLeadershipLost)
	}
}

// append adds an entry of this leader to its log.
func (s *server) append(e *entry) {
	e.index, e.term = s.last()+1, s.term
	s.write([]*entry{e}, func() {
		if s.role == leader {
			s.advance()
		}
	})
	if !s.flushing {
		s.flushing = true
		s.after(s.w.upTo(time.Millisecond), func() {
			s.flushing = false
			if s.role == leader {
				s.flush(false)
			}
		})
	}
}

// flush sends followers what they lack; beat also to those that lack nothing.
func (s *server) flush(beat bool) {
	w := s.w
	for i, p := range w.servers {
		if p == s {
			continue
		}
		to := &s.peers[i]
		if to.sentAt != 0 && w.now-to.sentAt > int64(resendAfter) {
			to.sentAt = 0
		}
		if !beat && (to.sentAt != 0 || to.next > s.last()) {
			continue
		}
		s.sendEntries(p, to)
	}
}

func (s *server) sendEntries(p *server, to *peer) {
	w, term, commit := s.w, s.term, s.commit
	prev := to.next - 1
	prevTerm, known := s.termAt(prev)
	if !known || prev < s.base() {
		img := s.image // there is one, or the log would begin at the first entry
		to.sentAt = w.now
		w.net.send(s.addr, p.addr, p.alive(func() { p.install(s, term, img) }))
		return
	}
	var entries []*entry
	if to.sentAt == 0 {
		from := prev - s.base()
		entries = slices.Clone(s.log[from:min(from+appendEntries, uint64(len(s.log)))])
	}
	if len(entries) > 0 {
		to.sentAt = w.now
	}
	w.net.send(s.addr, p.addr, p.alive(func() { p.take(s, term, prev, prevTerm, entries, commit) }))
}

// obey takes a leader's word; false when its term is over.
func (s *server) obey(from *server, term uint64) bool {
	if term < s.term {
		current := s.term
		s.w.net.send(s.addr, from.addr, from.alive(func() { from.overruled(current) }))
		return false
	}
	if term > s.term && s.full {
		return false // the term cannot be kept
	}
	if s.role == leader && from != s {
		if term == s.term {
			s.w.failf("%s and %s both lead term %d", s, from, term)
			return false
		}
		s.stepDown("a newer leader")
	}
	s.term, s.leader, s.heard = term, from.id, s.w.now
	return true
}

func (s *server) overruled(term uint64) {
	if term > s.term && !s.full {
		s.term = term
		s.stepDown("a newer term")
	}
}

// take is a follower's side of sendEntries.
func (s *server) take(from *server, term, prev, prevTerm uint64, entries []*entry, commit uint64) {
	if !s.obey(from, term) {
		return
	}
	answer := func(ok bool, match uint64) {
		s.w.net.send(s.addr, from.addr, from.alive(func() { from.answered(s, term, ok, match) }))
	}
	if have, known := s.termAt(prev); !known || have != prevTerm {
		answer(false, s.commit) // what is committed is the same everywhere
		return
	}
	for len(entries) > 0 {
		e := entries[0]
		have, known := s.termAt(e.index)
		if e.index > s.base() && (!known || have != e.term) {
			break
		}
		entries = entries[1:]
		prev = e.index
	}
	matched := func(to uint64) {
		if to = min(to, s.synced); min(commit, to) > s.commit {
			s.commit = min(commit, to)
			s.apply()
		}
		answer(true, to)
	}
	switch {
	case len(entries) == 0, s.full:
		matched(prev)
	default:
		if first := entries[0].index; first <= s.last() {
			s.truncate(first)
		}
		end := entries[len(entries)-1].index
		s.write(entries, func() { matched(end) })
	}
}

// truncate cuts off entries that another leader's replace.
func (s *server) truncate(from uint64) {
	if from <= s.commit {
		s.w.failf("%s is to cut off %d, but %d is committed", s, from, s.commit)
		return
	}
	s.w.note("%s cuts its log off before %d", s, from)
	s.w.coverage.fault("uncommitted entries cut off")
	s.log = s.log[:from-s.base()-1]
	s.synced = min(s.synced, from-1)
}

// answered is a leader's side of a follower's answer.
func (s *server) answered(p *server, term uint64, ok bool, match uint64) {
	to := &s.peers[p.id]
	if s.role != leader || term != s.term {
		return
	}
	to.heard, to.sentAt = s.w.now, 0
	before := *to
	if ok {
		to.match = max(to.match, match)
		s.advance()
	}
	to.next = max(match, to.match) + 1
	if news := to.match > before.match || !ok && to.next != before.next; news && to.next <= s.last() {
		s.sendEntries(p, to) // without news the next beat is soon enough
	}
}

// advance commits what a majority has on its disks.
func (s *server) advance() {
	synced := make([]uint64, 0, len(s.peers))
	for i := range s.peers {
		if i == s.id {
			synced = append(synced, s.synced)
		} else {
			synced = append(synced, min(s.peers[i].match, s.last()))
		}
	}
	slices.Sort(synced)
	index := synced[len(synced)-s.w.majority()]
	if t, _ := s.termAt(index); index > s.commit && t == s.term {
		s.commit = index
		s.apply()
	}
}

// apply applies what is committed, a bit at a time.
func (s *server) apply() {
	if s.applying || s.applied >= s.commit {
		return
	}
	s.applying = true
	s.after(s.w.upTo(s.lag), func() {
		s.applying = false
		for n := 0; n < applyEntries && s.applied < s.commit && s.w.cause == nil; n++ {
			e := s.at(s.applied + 1)
			if e == nil {
				s.w.failf("%s has committed %d but its log ends at %d", s, s.commit, s.last())
				return
			}
			s.applyEntry(e)
		}
		s.apply()
	})
}

func (s *server) applyEntry(e *entry) {
	var res cluster.Result
	switch {
	case e.req != nil:
		var err error
		before := s.state.Snapshot()
		if res, err = s.state.Apply(e.index, e.req.entry); err != nil {
			s.w.failf("%s applies %d (%s): %w", s, e.index, kindName(e.req.cmd), err)
			return
		}
		if err := checkQuota(e.req.cmd, before, s.state.Snapshot()); err != nil {
			s.w.failf("%s applies %d: %w", s, e.index, err)
			return
		}
		s.w.applied++
	case e.restore != nil:
		s.load(e.restore, s.state.Snapshot())
	}
	s.applied, s.appliedIn = e.index, e.term
	s.w.truth.appliedEntry(s, e, res)
	if s.role == leader && s.reign == nil && e.term == s.term {
		s.reign = newReign(s) // its own first entry: it has caught up
	}
	if wait, ok := s.waiting[e.index]; ok {
		delete(s.waiting, e.index)
		if wait.term == e.term {
			wait.reply(res, nil)
		} else {
			wait.reply(res, errLeadershipLost)
		}
	}
	if s.sinceSnap++; (s.sinceSnap >= s.w.weather.snapshotEvery || e.restore != nil) && !s.full {
		s.snapshot()
	}
}

// snapshot puts the state on the disk and forgets the log up to it, but for a few entries.
func (s *server) snapshot() {
	s.sinceSnap = 0
	s.image = &image{index: s.applied, term: s.appliedIn, state: s.state.Snapshot()}
	s.w.coverage.Snapshots++
	if keep := s.applied - min(s.applied, trailingEntries); keep > s.base() {
		s.log = slices.Clone(s.log[keep-s.base():])
	}
}

// install replaces log and state by the leader's.
func (s *server) install(from *server, term uint64, i *image) {
	if !s.obey(from, term) || s.full {
		return
	}
	if i.index > s.commit {
		s.w.note("%s takes over %s's snapshot at %d", s, from, i.index)
		s.w.coverage.fault("snapshot installed")
		s.log, s.synced, s.image, s.sinceSnap = nil, i.index, i, 0
		s.load(i, nil)
		s.w.truth.loaded(s)
	}
	match := max(i.index, s.commit)
	s.w.net.send(s.addr, from.addr, from.alive(func() { from.answered(s, term, true, match) }))
}
