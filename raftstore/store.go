// Package raftstore keeps a cluster.State on disk and on several servers: hashicorp/raft over a bbolt log, snapshots in bbolt files, and the
// archives of `nomad operator snapshot`. The rules live in package cluster; here
// is only machinery. DESIGN.md tells what is promised and why.
//
// A write that Apply has acknowledged is on disk (fsync). A write that Apply
// refused with an error of the rules changed nothing. After any other error of
// Apply the write may or may not have happened; repeating the same command (its
// RequestID is stamped by then) applies it at most once.
package raftstore

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"

	"github.com/rxvision/rxvision/cluster"
)

// Limits.
const (
	// MaxEntry bounds one log entry in bytes; a larger command is refused with CodeTooLarge.
	MaxEntry = 1 << 20
	// maxInFlight bounds the bytes of all commands between Apply's entry and its
	// return; each counts at least minWeight. Further callers wait.
	maxInFlight = 32 << 20
	minWeight   = 32 << 10
	// snapshotBytes of applied entries make a snapshot due, however few they are, or
	// as many as the last snapshot has, when that is larger.
	snapshotBytes = 64 << 20
	// enqueueTimeout bounds the wait for raft's attention, which it gives to one
	// thing at a time; what it has taken it answers.
	enqueueTimeout = 2 * time.Second
	lockTimeout    = time.Second // for the data folder's lock
	retryPause     = 5 * time.Millisecond
	// maxRounds bounds the rounds of proposals under way.
	maxRounds = 2
	// maxAppend bounds the entries that are stored, sent and applied together.
	maxAppend = 256
	// commitTimeout bounds how long an idle follower does not know that an entry is
	// committed, unless an answer of the leader tells it.
	commitTimeout = 5 * time.Millisecond
)

// Config is what Open needs. Dir, Bind and Logger are required.
type Config struct {
	Dir       string // data folder, created when missing; one server at a time may use it
	Bind      string // host:port of the Raft port, for servers only; port 0 takes any free one
	Advertise string // host:port at which other servers reach Bind; "": Bind itself
	Name      string // this server's name, shown to operators
	Version   string // of the program, recorded in snapshots
	// Region and Datacenter are this server's; servers of another region are refused.
	Region, Datacenter string
	RPCAddr, HTTPAddr  string // of agents' and users' ports, told to the other servers
	// BootstrapExpect is how many servers with empty folders begin a new cluster
	// together, 1, 3 or 5; the same on all. 0: this one only joins. It changes
	// nothing in a folder that is in use already.
	BootstrapExpect int
	// RetryJoin are Raft addresses, host:port, of any servers of the region; this
	// one's own may be among them. They are tried until a cluster is found or begun.
	RetryJoin []string
	TLS       *PeerTLS // nil: plain text, on loopback only
	// LogStore is the store of the log of a new data folder: LogWAL or LogBbolt; "":
	// DefaultLogStore. A folder in use keeps its own.
	LogStore   string
	Logger     *slog.Logger
	Registerer prometheus.Registerer // nil: no metrics
	Tuning
	segment int                   // bytes of a segment of the log; walSegment
	commit  time.Duration         // for tests: in place of commitTimeout
	fault   func(op string) error // for tests: called where a write begins; its error is the write's
	dialer  dialer                // for tests; nil: net.Dialer's
}

// Tuning holds the timers and thresholds; zero values take the defaults.
type Tuning struct {
	Heartbeat         time.Duration // a follower without contact for this long starts an election; 1 s
	Election          time.Duration // a candidate tries again; as Heartbeat
	LeaderLease       time.Duration // a leader without a quorum for this long steps down; as Heartbeat
	LeaderWait        time.Duration // how long Apply waits for a leader before it gives ErrNoLeader; 5 s
	SnapshotInterval  time.Duration // how often the thresholds are looked at; 30 s
	SnapshotThreshold uint64        // log entries that make a snapshot due; 8192
	TrailingLogs      uint64        // log entries kept behind a snapshot for slow followers; 2048
	MaxArchive        int64         // bytes of an archive, packed and unpacked, that RestoreArchive takes; DefaultMaxArchive
	MeetInterval      time.Duration // how often servers look after each other; 1 s
	FailedAfter       time.Duration // a server that has not answered for this long has failed; 10 s
	AutopilotInterval time.Duration // how often the leader judges the servers' health, and a fifth as often acts; 2 s
}

func (t *Tuning) defaults() {
	setDefault(&t.Heartbeat, time.Second)
	setDefault(&t.Election, t.Heartbeat)
	setDefault(&t.LeaderLease, t.Heartbeat)
	setDefault(&t.LeaderWait, 5*time.Second)
	setDefault(&t.SnapshotInterval, 30*time.Second)
	setDefault(&t.SnapshotThreshold, 8192)
	setDefault(&t.TrailingLogs, 2048)
	setDefault(&t.MaxArchive, DefaultMaxArchive)
	setDefault(&t.MeetInterval, time.Second)
	setDefault(&t.FailedAfter, 10*time.Second)
	setDefault(&t.AutopilotInterval, 2*time.Second)
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Store is a replicated cluster.State. All methods may be called by any goroutine.
type Store struct {
	cfg       Config
	log       *slog.Logger
	id        raft.ServerID
	lock      *os.File // the data folder's
	disk      *disk
	port      *port
	trans     *raft.NetworkTransport
	service   *grpc.Server
	clients   clients
	member    *membership
	circle    *circle
	answers   atomic.Pointer[Answerer]
	pilot     pilot
	raft      *raft.Raft
	fsm       *fsm
	leading   leadership
	reigns    reigns
	confirms  rounds
	proposals proposals
	convoy    convoy
	hearsay   hearsay
	start     string // new for each Open
	metrics   *metrics
	weight    *semaphore.Weighted

	fatal      chan error    // gets the reason once
	failed     chan struct{} // closed after that
	failure    error
	failedAt   time.Time
	failOnce   sync.Once
	mute       chan struct{} // closed when raft may answer no longer; see settle
	muteOnce   sync.Once
	closing    chan struct{}
	ending     context.Context // ends with closing
	end        context.CancelFunc
	closeOnce  sync.Once
	closeErr   error
	mu         sync.Mutex     // orders the begin of an operation against closing
	ops        sync.WaitGroup // operations and goroutines under way
	serving    sync.WaitGroup // the gRPC service
	restoring  sync.Mutex     // one RestoreArchive at a time
	removing   sync.Map       // IDs of servers that this leader is taking out
	succeeding sync.Mutex     // one search for the leader's heir at a time
}

// Open opens the data folder and starts this server's part of the region. It
// returns once the log and the newest snapshot are read; becoming leader takes a
// moment more (LeaderCh tells when).
func Open(cfg Config) (_ *Store, err error) {
	if cfg.Dir == "" || cfg.Bind == "" || cfg.Logger == nil {
		return nil, errors.New("open store: Dir, Bind and Logger must be set")
	}
	s := &Store{
		cfg: cfg, log: cfg.Logger,
		weight: semaphore.NewWeighted(maxInFlight),
		fatal:  make(chan error, 1), failed: make(chan struct{}), mute: make(chan struct{}), closing: make(chan struct{}),
		circle: newCircle(), start: newUUID(),
	}
	s.ending, s.end = context.WithCancel(context.Background())
	s.clients = clients{dial: s.dialPeers, conns: map[string]*grpc.ClientConn{}}
	s.leading.init()
	s.reigns.init()
	defer func() {
		if err != nil {
			err = fmt.Errorf("open store in %s: %w", cfg.Dir, errors.Join(unwritable(cfg.Dir, wayOut(cfg.Dir, err)), s.release()))
		}
	}()
	if err := s.openFolder(); err != nil {
		return nil, err
	}
	snaps, err := openSnapshots(cfg.Dir, s.log)
	if err != nil {
		return nil, err
	}
	if err := s.disk.complete(snaps); err != nil {
		return nil, err
	}
	used, err := raft.HasExistingState(s.disk, s.disk, snaps)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.checkBegin(used); err != nil {
		return nil, err
	}
	alone := !used && s.cfg.BootstrapExpect == 1 && len(cfg.RetryJoin) == 0
	if s.member, err = openMembership(cfg.Dir, used); err != nil {
		return nil, err
	}
	if err := s.listen(); err != nil {
		return nil, err
	}
	s.cfg.defaults()
	s.disk.patience = max(stallFactor*s.cfg.LeaderLease, minStall)
	conf, notify := s.raftConfig()
	if alone {
		self := raft.Server{Suffrage: raft.Voter, ID: s.id, Address: s.trans.LocalAddr()}
		if err := raft.BootstrapCluster(conf, s.disk, s.disk, snaps, s.trans, raft.Configuration{Servers: []raft.Server{self}}); err != nil {
			return nil, fmt.Errorf("begin a new region: %w", err)
		}
		if err := s.member.belong(newUUID()); err != nil {
			return nil, err
		}
	}
	s.metrics = newMetrics(s)
	s.fsm = newFSM(filepath.Join(cfg.Dir, tmpFolder), cfg.createdBy(), s.metrics, s.fail, s.closing)
	if s.raft, err = newRaft(conf, s.fsm, s.disk, snaps, &gate{s.trans, s.disk, &s.fsm.news}); err != nil {
		return nil, err
	}
	s.fsm.running.Store(true)
	s.disk.running.Store(true)
	s.run(notify)
	s.ops.Go(s.snapshotWhenDue)
	s.disk.voters.Store(s.voterCount())
	s.ops.Go(func() { s.disk.watch(s.progress) })
	if err := s.metrics.register(cfg.Registerer); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.log.Info("store is open", "server", s.id, "address", s.trans.LocalAddr(), "index", s.fsm.appliedIndex())
	return s, nil
}

func (c *Config) createdBy() string {
	return strings.TrimSpace(strings.Join([]string{"rxvision", c.Version, c.Name}, " "))
}

// newUUID makes a random (version 4) UUID.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// checkBegin says whether this server knows how to come to a cluster.
func (c *Config) checkBegin(used bool) error {
	switch c.BootstrapExpect {
	case 0, 1, 3, 5:
	default:
		return fmt.Errorf("bootstrap_expect is %d; a cluster begins with 1, 3 or 5 servers", c.BootstrapExpect)
	}
	if len(c.RetryJoin) > maxAcquaintances {
		return fmt.Errorf("retry_join names %d servers, over the limit of %d", len(c.RetryJoin), maxAcquaintances)
	}
	if !used && c.BootstrapExpect != 1 && len(c.RetryJoin) == 0 {
		return errors.New("it holds no server yet; set retry_join to find the other servers, or bootstrap_expect to 1 to begin a new region with this one alone")
	}
	return nil
}

// listen opens the port, which lets nobody in before run.
func (s *Store) listen() error {
	p, err := listenPort(s.cfg.Bind, s.cfg.Advertise, s.cfg.TLS, s.log)
	if err != nil {
		return err
	}
	p.greet, p.admit, p.lost, p.rarely, p.dialer = s.greet, s.admit, s.lostConnection, s.circle.rarely, s.cfg.dialer
	if p.dialer == nil {
		p.dialer = (&net.Dialer{}).DialContext
	}
	s.port = p
	s.trans = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: &raftLayer{p.kinds[kindRaft], p}, ServerAddressProvider: s,
		MaxPool: 3, Timeout: 10 * time.Second, Logger: raftLogger(s.log), MsgpackUseNewTimeFormat: true,
	})
	return nil
}

// run starts what needs raft, and lets other servers in.
func (s *Store) run(notify <-chan bool) {
	s.pilot.init(s)
	s.followReigns()
	s.ops.Go(func() { s.lead(notify) })
	s.ops.Go(s.meetAll)
	s.ops.Go(s.runPilot)
	s.service = s.newService()
	s.serving.Go(func() { _ = s.service.Serve(s.port.kinds[kindPeers]) }) // ends with Stop
	s.port.serve()
	s.campaignAlone()
}

func (s *Store) raftConfig() (*raft.Config, <-chan bool) {
	notify := make(chan bool, 16) // raft waits for room
	c := raft.DefaultConfig()
	c.LocalID = s.id
	c.Logger = raftLogger(s.log)
	c.NotifyCh = notify
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = s.cfg.Heartbeat, s.cfg.Election, s.cfg.LeaderLease
	c.BatchApplyCh, c.MaxAppendEntries = true, maxAppend
	c.CommitTimeout = s.commitTimeout()
	c.ShutdownOnRemove = false // it may come back
	c.SnapshotInterval, c.SnapshotThreshold, c.TrailingLogs = s.cfg.SnapshotInterval, s.cfg.SnapshotThreshold, s.cfg.TrailingLogs
	return c, notify
}

// commitTimeout is raft's, which it lengthens at random to twice that.
func (s *Store) commitTimeout() time.Duration {
	return cmp.Or(s.cfg.commit, min(commitTimeout, s.cfg.Heartbeat/2))
}

// newRaft starts raft. It panics on a log entry that it cannot read; here that
// becomes an error.
func newRaft(conf *raft.Config, f *fsm, d *disk, snaps *snapshots, trans raft.Transport) (r *raft.Raft, err error) {
	defer func() {
		fault := snaps.damage()
		switch p := recover(); {
		case p != nil && fault != nil:
			err = fmt.Errorf("%w; an older snapshot does not help, because the log does not reach back to it", fault)
		case p != nil:
			err = &Damage{File: d.entries.Where(0), What: "the log", Cause: fmt.Errorf("%v", p)}
		case err != nil:
			err = errors.Join(err, f.restoreErr, fault)
		}
	}()
	return raft.NewRaft(conf, f, d, d, snaps, trans)
}

// Close stops this server's part and returns when everything of it has ended. A
// leader hands its leadership over first; writes under way are answered. It gives the reason on which the store
// had failed before, if it had.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.stepAside()
		s.mu.Lock()
		close(s.closing)
		s.mu.Unlock()
		s.end()
		late := time.AfterFunc(enqueueTimeout, s.clients.close) // a leader that does not answer
		s.ops.Wait()                                            // while raft still answers them
		late.Stop()
		s.service.Stop()
		s.clients.close()
		s.serving.Wait()
		err := s.raft.Shutdown().Error()
		s.metrics.unregister(s.cfg.Registerer)
		s.leading.close()
		s.fsm.stop()
		if s.Err() == nil {
			err = errors.Join(err, s.disk.saveMark(s.progress()))
		}
		s.closeErr = errors.Join(s.Err(), err, s.release())
	})
	return s.closeErr
}

// release closes what Open opened first.
func (s *Store) release() error {
	var errs []error
	s.end()
	if s.trans != nil {
		errs = append(errs, s.trans.Close())
	}
	if s.port != nil {
		errs = append(errs, s.port.close())
	}
	if s.disk != nil {
		errs = append(errs, s.disk.close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
	}
	return errors.Join(errs...)
}

// begin marks an operation as under way, so that Close waits for it.
func (s *Store) begin() (end func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.Err(); err != nil {
		return nil, err
	}
	select {
	case <-s.closing:
		return nil, errClosing
	default:
		s.ops.Add(1)
		return s.ops.Done, nil
	}
}

var errClosing = &cluster.Error{Code: cluster.CodeUnavailable, Text: "the server is shutting down"}

// fail ends the store for good: its disk or log cannot be trusted any more.
func (s *Store) fail(err error) {
	s.failOnce.Do(func() {
		s.failure, s.failedAt = &failure{wayOut(s.cfg.Dir, err)}, time.Now()
		close(s.failed)
		s.silence()
		s.log.Error("store has failed; the server must stop", "error", err)
		s.fatal <- s.failure
	})
}

// failure carries the reason for the end; its code is unavailable.
type failure struct{ cause error }

func (f *failure) Error() string { return "the server's store has failed: " + f.cause.Error() }
func (f *failure) Unwrap() []error {
	return []error{&cluster.Error{Code: cluster.CodeUnavailable, Text: f.Error()}, f.cause}
}

// Fatal gives the reason, once, when the store can go on no longer: a log entry
// that this version does not know, a damaged entry, a disk that fails. Whoever
// runs the server ends it then, with that reason.
func (s *Store) Fatal() <-chan error { return s.fatal }

// Err is the reason that Fatal gave, nil while all is well.
func (s *Store) Err() error {
	select {
	case <-s.failed:
		return s.failure
	default:
		return nil
	}
}

// State is the current state. A restore replaces it by another one; snapshots
// of the old are then marked (Snapshot.Abandoned).
func (s *Store) State() *cluster.State { return s.fsm.current.Load() }

// SnapshotMinIndex waits until the command at that log index is applied and
// gives a view no older than it.
func (s *Store) SnapshotMinIndex(ctx context.Context, index uint64) (*cluster.Snapshot, error) {
	if err := s.fsm.wait(ctx, index, s.failed, s.closing); err != nil {
		if fatal := s.Err(); fatal != nil {
			err = fatal
		}
		return nil, fmt.Errorf("wait for index %d: %w", index, err)
	}
	return s.State().Snapshot(), nil
}
