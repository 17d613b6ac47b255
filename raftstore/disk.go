package raftstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rxvision/rxvision/cluster"
)

const (
	// diskRetry is how often a write that found the disk full is tried again.
	diskRetry = 250 * time.Millisecond
	// markEvery is how often the stable file is told how far the log goes.
	markEvery = time.Second
	// stallFactor times the leader's lease: a write that takes longer is a stall.
	stallFactor = 4
	minStall    = time.Second
)

// disk stands between raft and the data folder, because raft panics where a
// write fails. A full disk is waited out; a stalled one takes this server out of
// the leadership. Any other fault ends the store with a reason: after a failed
// fsync nobody knows what the disk holds.
type disk struct {
	stable   *stable
	entries  logStore
	tail     tail
	log      *slog.Logger
	dir      string
	fail     func(error)
	silence  func() // told before a goroutine of raft is ended without a failure
	closing  <-chan struct{}
	patience time.Duration         // writes over that are a stall
	appends  prometheus.Histogram  // seconds
	running  atomic.Bool           // false while raft starts: errors end Open then
	fault    func(op string) error // for tests: called where a write begins

	voters atomic.Int32  // servers with a vote, 0 when not known
	last   atomic.Uint64 // index of the newest entry, 0 for none

	marking sync.Mutex // held while log or mark change
	mark    mark

	mu     sync.Mutex
	fullAt time.Time         // since when the disk is full; zero: it is not
	grown  chan struct{}     // closed when last grows; nil when nobody waits
	writes map[int]time.Time // under way, by a number of their own
	serial int
}

// mark is what the stable file remembers of the log, so that a log that has lost
// its end is not taken for one that never had it, and so that a server that must
// not write knows what it may show.
type mark struct {
	Last   uint64 // there was an entry with this index
	Commit uint64 // commands up to this index were applied
	Voters int32  // servers with a vote, 0 when not known
}

const markKey = "mark"

// errFull says that nothing was stored because the disk is full.
func (d *disk) errFull() error {
	return cluster.Errorf(cluster.CodeUnavailable,
		"the disk of the server's data folder %s is full: nothing was stored; free some space and try again", d.dir)
}

// full says whether err means that nothing was written for lack of space. Only a
// plain write or growth that was refused counts; the same error from an fsync
// leaves the file in doubt.
func full(err error) bool {
	var refused *fs.PathError
	return errors.As(err, &refused) && refused.Op != "sync" && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT))
}

// IsMonotonic implements raft.MonotonicLogStore: the log has no holes.
func (d *disk) IsMonotonic() bool { return true }

// FirstIndex implements raft.LogStore.
func (d *disk) FirstIndex() (uint64, error) { return d.entries.FirstIndex() }

// LastIndex implements raft.LogStore.
func (d *disk) LastIndex() (uint64, error) { return d.last.Load(), nil }

// GetLog implements raft.LogStore. What comes from the disk is checked.
func (d *disk) GetLog(index uint64, l *raft.Log) error {
	if d.tail.get(index, l) {
		return nil
	}
	err := d.readEntry(index, l)
	if err == nil || errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	return d.broken(err)
}

func (d *disk) readEntry(index uint64, l *raft.Log) error {
	err := d.entries.GetLog(index, l)
	switch {
	case err == nil && l.Index != index:
		err = fmt.Errorf("is entry %d", l.Index)
	case err == nil || errors.Is(err, raft.ErrLogNotFound) || deviceFault(err):
		return err
	}
	return &Damage{File: d.entries.Where(index), What: fmt.Sprintf("log entry %d", index), Cause: err}
}

// StoreLog implements raft.LogStore.
func (d *disk) StoreLog(l *raft.Log) error { return d.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore: all entries are on disk, or none.
func (d *disk) StoreLogs(logs []*raft.Log) error {
	write := func() error { return d.store(logs) }
	if len(logs) == 1 && logs[0].Type == raft.LogNoop && d.voters.Load() == 1 {
		return d.insist("the log", write) // raft would step down and win the next term, over and over
	}
	err := d.timed("append", write)
	d.setFull(full(err))
	switch {
	case err == nil:
		return nil
	case full(err):
		return d.errFull()
	}
	return d.broken(fmt.Errorf("write the log in %s: %w", d.dir, err))
}

func (d *disk) store(logs []*raft.Log) error {
	d.marking.Lock()
	defer d.marking.Unlock()
	if last := d.last.Load(); last > 0 && logs[0].Index > last+1 {
		// Raft leaves a hole behind a snapshot that it was given, and may be killed
		// before it deletes what lies in front of it.
		if err := d.delete(0, last); err != nil {
			return err
		}
	}
	if err := d.entries.StoreLogs(logs); err != nil {
		return err
	}
	d.tail.add(logs)
	d.last.Store(logs[len(logs)-1].Index)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.grown != nil {
		close(d.grown)
		d.grown = nil
	}
	return nil
}

// reaches waits until the log has an entry; false when the timer or closing was first.
func (d *disk) reaches(index uint64, late <-chan time.Time) bool {
	for {
		d.mu.Lock()
		if d.last.Load() >= index {
			d.mu.Unlock()
			return true
		}
		if d.grown == nil {
			d.grown = make(chan struct{})
		}
		grown := d.grown
		d.mu.Unlock()
		select {
		case <-grown:
		case <-late:
			return false
		case <-d.closing:
			return false
		}
	}
}

// DeleteRange implements raft.LogStore.
func (d *disk) DeleteRange(first, last uint64) error {
	d.marking.Lock()
	defer d.marking.Unlock()
	err := d.timed("delete", func() error { return d.delete(first, last) })
	if err == nil || full(err) {
		return err // the entries stay, and are deleted after the next snapshot
	}
	return d.broken(fmt.Errorf("shorten the log in %s: %w", d.dir, err))
}

// delete lowers the mark before the end of the log goes. Marking is locked.
func (d *disk) delete(first, last uint64) error {
	newest := d.last.Load()
	if last >= newest {
		begin, err := d.entries.FirstIndex()
		if err != nil {
			return err
		}
		newest = 0
		if first > begin {
			newest = first - 1
		}
		if lower := (mark{Last: newest, Commit: d.mark.Commit, Voters: d.mark.Voters}); d.mark.Last > newest {
			if err := d.putMark(lower); err != nil {
				return err
			}
		}
	}
	if err := d.entries.DeleteRange(first, last); err != nil {
		return err
	}
	d.tail.remove(first, last)
	d.last.Store(newest)
	return nil
}

func (d *disk) putMark(m mark) error {
	if err := d.stable.put(map[string][]byte{markKey: cluster.Marshal(m)}); err != nil {
		return err
	}
	d.mark = m
	return nil
}

// saveMark brings the mark up to date.
func (d *disk) saveMark(commit uint64, voters int32) error {
	d.marking.Lock()
	defer d.marking.Unlock()
	m := mark{Last: d.last.Load(), Commit: commit, Voters: voters}
	if m == d.mark {
		return nil
	}
	return d.putMark(m)
}

// verify reads the whole log once and compares its end with the mark. covered is
// asked for the index up to which a snapshot holds everything: damaged entries
// before that are only copies for slow followers, and are dropped.
func (d *disk) verify(covered func() uint64) error {
	if b := d.stable.get(markKey); b != nil {
		if err := cluster.Unmarshal(b, &d.mark); err != nil {
			return err
		}
	}
	first, err := d.entries.FirstIndex()
	if err != nil {
		return &Damage{File: d.entries.Where(0), What: "the log", Cause: err}
	}
	last, err := d.entries.LastIndex()
	if err != nil {
		return &Damage{File: d.entries.Where(0), What: "the log", Cause: err}
	}
	if last < d.mark.Last {
		what := fmt.Sprintf("the log, which ends at entry %d although entries up to %d were stored,", last, d.mark.Last)
		return &Damage{File: d.entries.Where(last), What: what, Cause: errors.New("its end is missing")}
	}
	d.last.Store(last)
	dropped := uint64(0)
	var l raft.Log
	for i := first; i <= last && i > 0; i++ {
		err := d.readEntry(i, &l)
		if errors.Is(err, raft.ErrLogNotFound) {
			err = &Damage{File: d.entries.Where(i), What: fmt.Sprintf("log entry %d", i), Cause: errors.New("it is missing")}
		}
		var damage *Damage
		switch {
		case err == nil:
		case errors.As(err, &damage) && i <= covered():
			dropped = i
			d.log.Warn("dropped damaged log entries that a snapshot covers", "index", i, "error", err)
		default:
			return err
		}
	}
	if dropped > 0 {
		return d.delete(first, dropped)
	}
	return nil
}

// Get implements raft.StableStore.
func (d *disk) Get(key []byte) ([]byte, error) { return d.stable.Get(key) }

// GetUint64 implements raft.StableStore.
func (d *disk) GetUint64(key []byte) (uint64, error) { return d.stable.GetUint64(key) }

// Set implements raft.StableStore.
func (d *disk) Set(key, value []byte) error {
	return d.insist("raft's term and vote", func() error { return d.stable.put(map[string][]byte{string(key): value}) })
}

// SetUint64 implements raft.StableStore.
func (d *disk) SetUint64(key []byte, value uint64) error { return d.Set(key, logKey(value)) }

// insist repeats what raft cannot do without, for as long as the disk is full. That
// it succeeds does not mean that there is room again: it takes little or none.
func (d *disk) insist(what string, write func() error) error {
	for {
		err := d.timed("insist", write)
		if full(err) {
			d.setFull(true)
		}
		if err == nil || !d.running.Load() {
			return err
		}
		if !full(err) {
			return d.broken(fmt.Errorf("write %s in %s: %w", what, d.dir, err))
		}
		select {
		case <-time.After(diskRetry):
		case <-d.closing:
			d.silence()
			runtime.Goexit() // see broken
		}
	}
}

// timed runs a write and notes how long it takes.
func (d *disk) timed(op string, write func() error) error {
	begin := time.Now()
	d.mu.Lock()
	d.serial++
	number := d.serial
	d.writes[number] = begin
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.writes, number)
		d.mu.Unlock()
	}()
	if d.fault != nil {
		if err := d.fault(op); err != nil {
			return err
		}
	}
	err := write()
	took := time.Since(begin)
	if op == "append" && err == nil {
		d.appends.Observe(took.Seconds())
	}
	if took > d.patience {
		d.log.Warn("the disk of the data folder is slow", "folder", d.dir, "write", op, "took", took)
	}
	return err
}

// broken ends the store. Raft would panic on the error, in a goroutine of its
// own, so that goroutine ends here instead; its deferred clean-up answers what it had
// begun, and settle everyone else.
func (d *disk) broken(err error) error {
	if d.running.Load() {
		d.fail(err)
		runtime.Goexit()
	}
	return err
}

func (d *disk) setFull(is bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case is == !d.fullAt.IsZero():
	case is:
		d.fullAt = time.Now()
		d.log.Error("data folder's disk is full; this server cannot lead until some space is free", "folder", d.dir)
	default:
		d.fullAt = time.Time{}
		d.log.Info("data folder can be written again", "folder", d.dir)
	}
}

// state says whether writes go through, and if not since when and why.
func (d *disk) state() DiskState {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.fullAt.IsZero() {
		return DiskState{Reason: fmt.Sprintf("the disk of the data folder %s is full", d.dir), Since: d.fullAt}
	}
	for _, since := range d.writes {
		if time.Since(since) > d.patience {
			return DiskState{Reason: fmt.Sprintf("a write to the data folder %s has not ended for %v", d.dir, time.Since(since).Round(time.Millisecond)), Since: since}
		}
	}
	return DiskState{OK: true}
}

// watch keeps the mark, and while the disk is full finds out when it is no
// longer: without a leader nobody writes. It asks now for the last applied
// command and the number of voters.
func (d *disk) watch(now func() (commit uint64, voters int32)) {
	tick := time.NewTicker(markEvery)
	defer tick.Stop()
	for stalled := false; ; {
		select {
		case <-tick.C:
		case <-d.closing:
			return
		}
		commit, voters := now()
		d.voters.Store(voters)
		switch state := d.state(); {
		case state.OK:
			stalled = false
			if err := d.saveMark(commit, voters); err != nil && !full(err) {
				_ = d.broken(fmt.Errorf("write the marks in %s: %w", d.dir, err)) // ends this goroutine
			}
		case d.isFull():
			if d.entries.Ready() == nil && writeProbe(d.dir, MaxEntry) == nil {
				d.setFull(false)
			}
		case !stalled:
			stalled = true
			d.log.Error("the disk of the data folder has stalled; with peers this server gives up leadership", "reason", state.Reason)
		}
	}
}

func (d *disk) isFull() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.fullAt.IsZero()
}

func (d *disk) close() error {
	err := d.stable.close()
	if d.entries != nil {
		err = errors.Join(d.entries.Close(), err)
	}
	return err
}

// progress is what disk.watch asks for.
func (s *Store) progress() (commit uint64, voters int32) { return s.fsm.appliedIndex(), s.voterCount() }

// voterCount is the number of servers with a vote in the newest configuration.
func (s *Store) voterCount() (n int32) {
	for _, m := range s.raft.GetConfiguration().Configuration().Servers {
		if m.Suffrage == raft.Voter {
			n++
		}
	}
	return n
}

// DiskState says whether a server can write to its data folder.
type DiskState struct {
	OK     bool
	Reason string    // "" when OK
	Since  time.Time // when it began; zero when OK
}

// DiskState tells whether this server can write to its data folder: not when its
// disk is full, or a write has been under way for too long, or the store failed.
func (s *Store) DiskState() DiskState {
	select {
	case <-s.failed:
		return DiskState{Reason: s.failure.Error(), Since: s.failedAt}
	default:
		return s.disk.state()
	}
}

// tail keeps the newest entries in memory: followers and the state machine ask
// for them right after they were written.
type tail struct {
	mu    sync.Mutex
	ring  [tailEntries]*raft.Log // entry i at i % tailEntries
	bytes int
	first uint64 // oldest that may be there
}

const (
	tailEntries = 1024
	tailBytes   = 32 << 20
)

func (t *tail) add(logs []*raft.Log) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range logs {
		t.drop(l.Index % tailEntries)
		kept := *l
		t.ring[l.Index%tailEntries] = &kept
		t.bytes += len(l.Data)
	}
	newest := logs[len(logs)-1].Index
	if newest >= tailEntries {
		t.first = max(t.first, newest-tailEntries+1)
	}
	for ; t.bytes > tailBytes && t.first < newest; t.first++ {
		if l := t.ring[t.first%tailEntries]; l != nil && l.Index == t.first {
			t.drop(t.first % tailEntries)
		}
	}
}

func (t *tail) drop(slot uint64) {
	if l := t.ring[slot]; l != nil {
		t.bytes -= len(l.Data)
		t.ring[slot] = nil
	}
}

func (t *tail) remove(first, last uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for slot, l := range t.ring {
		if l != nil && l.Index >= first && l.Index <= last {
			t.drop(uint64(slot))
		}
	}
	t.first = 0
}

func (t *tail) get(index uint64, l *raft.Log) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	kept := t.ring[index%tailEntries]
	if kept == nil || kept.Index != index {
		return false
	}
	*l = *kept
	return true
}

// gate is raft's transport with this server's part in elections left out while
// its disk cannot be written: a leader that stores nothing is worse than none.
type gate struct {
	*raft.NetworkTransport
	disk *disk
	news *news
}

// AppendEntries implements raft.Transport. While a write is stalled raft's
// heartbeats would go on for ever, because they come from goroutines of their own.
func (g *gate) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if state := g.disk.state(); !state.OK && !g.disk.isFull() {
		return errors.New(state.Reason)
	}
	return g.NetworkTransport.AppendEntries(id, target, args, resp)
}

// RequestVote implements raft.Transport.
func (g *gate) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if state := g.disk.state(); !state.OK {
		return errors.New(state.Reason)
	}
	return g.NetworkTransport.RequestVote(id, target, args, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (g *gate) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if state := g.disk.state(); !state.OK {
		return errors.New(state.Reason)
	}
	return g.NetworkTransport.RequestPreVote(id, target, args, resp)
}

// raftLogger passes raft's messages on to l. Raft tells of each election as a
// warning; one level less fits what operators expect.
func raftLogger(l *slog.Logger) hclog.Logger {
	h := hclog.NewInterceptLogger(&hclog.LoggerOptions{Level: hclog.Off})
	h.RegisterSink(logSink{l})
	return h
}

type logSink struct{ *slog.Logger }

// Accept implements hclog.SinkAdapter.
func (s logSink) Accept(_ string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case hclog.Warn:
		to = slog.LevelInfo
	case hclog.Error:
		to = slog.LevelError
	}
	if !s.Enabled(context.Background(), to) {
		return
	}
	for i, a := range args {
		if f, ok := a.(hclog.Format); ok {
			args[i] = fmt.Sprintf(f[0].(string), f[1:]...)
		}
	}
	s.Log(context.Background(), to, msg, args...) //nolint:sloglint // the words are raft's
}
