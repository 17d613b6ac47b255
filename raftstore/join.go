package raftstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore/pb"
)

// Bounds of finding each other.
const (
	maxAcquaintances = 64 // servers that one remembers, and tells of
	meetTimeout      = 2 * time.Second
	meetFirst        = 50 * time.Millisecond // between rounds at first, doubled up to meetLongest
	meetLongest      = 2 * time.Second
	joinTimeout      = 5 * time.Second
	refusedPause     = 30 * time.Second // before a warning is repeated
)

// acquaintance is what is known of another server.
type acquaintance struct {
	id, addr string
	intro    *pb.Introduction // its newest; nil while it has not answered
	server   *cluster.Server  // out of intro
	gone     bool             // it did not answer at addr lately
	first    time.Time        // when it was heard of
	met      time.Time        // when it last answered, or asked
}

// circle is the servers that this one knows.
type circle struct {
	mu    sync.Mutex
	byID  map[string]*acquaintance
	wake  chan struct{} // the next round is due now
	heard map[string]time.Time
}

func newCircle() *circle {
	return &circle{byID: map[string]*acquaintance{}, wake: make(chan struct{}, 1), heard: map[string]time.Time{}}
}

// note remembers an introduction; it says whether that is news.
func (c *circle) note(in *pb.Introduction, server *cluster.Server) (news bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	a := c.byID[server.ID]
	if a == nil {
		if len(c.byID) >= maxAcquaintances {
			c.forgetOldest()
		}
		a = &acquaintance{id: server.ID, first: now}
		c.byID[server.ID] = a
	}
	news = a.intro == nil || a.addr != server.RaftAddr || a.intro.ClusterId != in.ClusterId || a.intro.Promised != in.Promised || a.intro.Expect != in.Expect
	a.addr, a.intro, a.server, a.met, a.gone = server.RaftAddr, in, server, now, false
	return news
}

// forgetOldest drops whom nobody has heard of for the longest. The caller holds mu.
func (c *circle) forgetOldest() {
	var oldest *acquaintance
	for _, a := range c.byID {
		if oldest == nil || a.met.Before(oldest.met) {
			oldest = a
		}
	}
	delete(c.byID, oldest.id)
}

// all lists the acquaintances by ID.
func (c *circle) all() []acquaintance {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]acquaintance, 0, len(c.byID))
	for _, a := range c.byID {
		out = append(out, *a)
	}
	slices.SortFunc(out, func(a, b acquaintance) int { return strings.Compare(a.id, b.id) })
	return out
}

// get is one of them; the zero value when unknown.
func (c *circle) get(id string) acquaintance {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.byID[id]; a != nil {
		return *a
	}
	return acquaintance{}
}

// missing notes that an address leads nowhere, so that the one in raft's
// configuration counts again.
func (c *circle) missing(addr string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.byID {
		if a.addr == addr {
			a.gone = true
		}
	}
}

// rarely is true the first time for a text and then once in a while.
func (c *circle) rarely(text string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if last, ok := c.heard[text]; ok && now.Sub(last) < refusedPause {
		return false
	}
	if len(c.heard) >= maxAcquaintances {
		clear(c.heard)
	}
	c.heard[text] = now
	return true
}

// poke makes the next round of meetings due.
func (s *Store) poke() {
	select {
	case s.circle.wake <- struct{}{}:
	default:
	}
}

// self is this server's record.
func (s *Store) self() *cluster.Server {
	return &cluster.Server{
		ID: string(s.id), Name: s.cfg.Name, Region: s.cfg.Region, Datacenter: s.cfg.Datacenter,
		RaftAddr: s.Addr(), RPCAddr: s.cfg.RPCAddr, HTTPAddr: s.cfg.HTTPAddr, Version: s.cfg.Version, Start: s.start,
		Rules: cluster.CurrentRules,
	}
}

// introduce says who this server is and how it stands.
func (s *Store) introduce() *pb.Introduction {
	index, term := s.lastLog()
	in := &pb.Introduction{
		Server: cluster.Marshal(s.self()), Expect: uint32(s.cfg.BootstrapExpect), ClusterId: s.member.cluster(),
		LastIndex: index, LastTerm: term, LastContact: int64(s.LastContact()), Member: s.begun(),
	}
	if p := s.member.promise(); p != nil {
		in.Promised = p.ClusterID
	}
	in.LeaderId, in.LeaderAddr = s.Leader()
	for _, a := range s.circle.all() {
		if a.addr != "" && !a.gone {
			in.Known = append(in.Known, &pb.Acquaintance{Id: a.id, Addr: a.addr})
		}
	}
	return in
}

// begun says whether this server belongs to a cluster, known by ID or not.
func (s *Store) begun() bool {
	return s.member.cluster() != "" || len(s.configuration().Servers) > 0
}

// heardFrom notes another server's introduction.
func (s *Store) heardFrom(in *pb.Introduction) error {
	var other cluster.Server
	if err := cluster.Unmarshal(in.Server, &other); err != nil {
		return err
	}
	switch {
	case other.ID == string(s.id) && other.Start != s.start:
		return fmt.Errorf("the server at %s has this server's ID %s: a data folder was copied; delete the copy", other.RaftAddr, other.ID)
	case other.ID == string(s.id):
		return nil
	case other.ID == "" || other.RaftAddr == "" || len(in.Known) > maxAcquaintances:
		return errors.New("its introduction is not well formed")
	}
	if s.circle.note(in, &other) {
		s.poke()
	}
	return nil
}

// meetAll is the loop that finds servers, begins or joins a cluster, keeps this
// server's record true, and watches that the others live.
func (s *Store) meetAll() {
	pause := meetFirst
	for {
		answered := s.meetRound()
		if s.begun() {
			s.beMember()
			pause = s.cfg.MeetInterval
		} else {
			s.find(answered)
			pause = min(2*pause, meetLongest)
		}
		timer := time.NewTimer(pause/2 + rand.N(pause/2+1))
		select {
		case <-timer.C:
		case <-s.circle.wake:
			timer.Stop()
			pause = meetFirst
		case <-s.closing:
			timer.Stop()
			return
		}
	}
}

// meetRound meets everyone once, at the same time, and gives the addresses that answered.
func (s *Store) meetRound() map[string]bool {
	addrs := map[string]bool{}
	if _, leader := s.Leader(); leader == "" || !s.begun() {
		for _, a := range s.cfg.RetryJoin {
			addrs[a] = true
		}
	}
	for _, m := range s.configuration().Servers {
		addrs[s.addrOf(string(m.ID))] = true
	}
	for _, a := range s.circle.all() {
		if a.addr == "" || a.gone && s.begun() {
			continue
		}
		addrs[a.addr] = true
		if a.intro == nil || s.begun() {
			continue
		}
		for _, k := range a.intro.Known {
			if len(addrs) < maxAcquaintances {
				addrs[k.Addr] = true
			}
		}
	}
	var mu sync.Mutex
	answered := map[string]bool{}
	var meetings sync.WaitGroup
	for addr := range addrs {
		if addr == "" || addr == s.Addr() {
			continue
		}
		meetings.Go(func() {
			if err := s.meet(addr, ""); err != nil {
				s.circle.missing(addr)
				return
			}
			mu.Lock()
			answered[addr] = true
			mu.Unlock()
		})
	}
	meetings.Wait()
	return answered
}

// meet asks the server at addr who it is; with a target only that server will do.
func (s *Store) meet(addr, target string) error {
	return s.ask(addr, target, func(ctx context.Context, c pb.PeersClient) error {
		in, err := c.Meet(ctx, s.introduce())
		if err != nil {
			return err
		}
		if err := s.heardFrom(in); err != nil {
			if s.circle.rarely(err.Error()) {
				s.log.Error("another server cannot be dealt with", "address", addr, "error", err)
			}
			return err
		}
		return nil
	})
}

// ask puts a short question to the server at addr.
func (s *Store) ask(addr, target string, question func(context.Context, pb.PeersClient) error) error {
	ctx, cancel := context.WithTimeout(s.ending, meetTimeout)
	defer cancel()
	client, err := s.clients.at(addr, target)
	if err != nil {
		return err
	}
	return fromStatus(question(ctx, client))
}

// find looks for a cluster to join, or begins one.
func (s *Store) find(answered map[string]bool) {
	for _, a := range s.circle.all() {
		if a.intro != nil && a.intro.ClusterId != "" && time.Since(a.met) < meetLongest*2 {
			if p := s.member.promise(); p != nil && p.ClusterID != a.intro.ClusterId {
				continue // first it must be free of its promise
			}
			s.join(a)
			return
		}
	}
	if p := s.member.promise(); p != nil {
		s.askAbout(p)
		return
	}
	s.form(answered)
}

// join asks a member of a cluster to let this server in.
func (s *Store) join(through acquaintance) {
	id := through.intro.ClusterId
	s.member.join(id)
	ctx, cancel := context.WithTimeout(s.ending, joinTimeout)
	defer cancel()
	err := s.askToJoin(ctx, through.addr)
	if err == nil {
		s.log.Info("joined a cluster", "cluster", id, "through", through.addr)
		if s.member.begin(id) {
			s.clients.drop() // they said hello as a stranger
		}
		return
	}
	s.member.join("")
	if s.ending.Err() == nil && s.circle.rarely(err.Error()) {
		s.log.Warn("could not join the cluster; trying again", "cluster", id, "through", through.addr, "error", err)
	}
}

func (s *Store) askToJoin(ctx context.Context, addr string) error {
	client, err := s.clients.at(addr, "")
	if err != nil {
		return err
	}
	_, err = client.Join(ctx, &pb.JoinRequest{Server: cluster.Marshal(s.self())})
	return fromStatus(err)
}

// askAbout finds out what became of the formation that this server is promised to.
// Its initiator alone knows: it says whether the formation is still under way, and
// when it has begun, the cluster is found like any other.
func (s *Store) askAbout(p *clusterNote) {
	if p.Initiator == string(s.id) { // begun before a restart, and not carried through
		s.callOff(p.ClusterID, "it was not carried through")
		return
	}
	a := s.circle.get(p.Initiator)
	switch {
	case time.Since(a.met) > 2*meetLongest:
		if err := s.meet(p.InitiatorAddr, ""); err != nil && s.circle.rarely("promise "+p.ClusterID) {
			s.log.Warn("this server is promised to a cluster that another one was about to begin, and cannot ask it what became of that. "+
				"If it never comes back, stop this server, delete "+clusterFile+" in its data folder and start it again",
				"server", p.Initiator, "address", p.InitiatorAddr, "error", err)
		}
	case a.intro.Promised != p.ClusterID && a.intro.ClusterId != p.ClusterID:
		s.callOff(p.ClusterID, "its initiator called it off")
	}
}

func (s *Store) callOff(formation, why string) {
	if err := s.member.release(formation); err != nil {
		s.log.Error("cannot take back the promise to a formation", "error", err)
		return
	}
	s.log.Info("a formation came to nothing", "formation", formation, "why", why)
}

// form begins a cluster when as many empty servers as expected know each other
// and this one's ID is the lowest. Each promises itself, durably, to this one
// formation, so that no two can be carried through by the same servers; it begins
// only when every one has promised.
func (s *Store) form(answered map[string]bool) {
	expect := s.cfg.BootstrapExpect
	if expect == 0 {
		return
	}
	self := pb.Acquaintance{Id: string(s.id), Addr: s.Addr()}
	voters := []*pb.Acquaintance{&self}
	for _, a := range s.circle.all() {
		if a.intro == nil || a.gone || time.Since(a.met) > 2*meetLongest || a.intro.Expect == 0 || a.intro.Member {
			continue
		}
		if int(a.intro.Expect) != expect {
			if s.circle.rarely("expect " + a.id) {
				s.log.Error("servers disagree about how many begin the cluster; give all of them the same bootstrap_expect",
					"here", expect, "there", a.intro.Expect, "address", a.addr)
			}
			return
		}
		voters = append(voters, &pb.Acquaintance{Id: a.id, Addr: a.addr})
	}
	if expect == 1 {
		voters = voters[:1]
		for _, addr := range s.cfg.RetryJoin {
			if !answered[addr] && addr != s.Addr() {
				return // it may have a cluster
			}
		}
	}
	slices.SortFunc(voters, func(a, b *pb.Acquaintance) int { return strings.Compare(a.Id, b.Id) })
	if len(voters) < expect || voters[0].Id != self.Id {
		return
	}
	f := &pb.Formation{Id: newUUID(), Initiator: self.Id, Addr: self.Addr, Expect: uint32(expect), Voters: voters[:expect]}
	if err := s.member.bind(f); err != nil {
		s.log.Error("cannot note the formation of a cluster", "error", err)
		return
	}
	if err := s.askPromises(f); err != nil {
		s.callOff(f.Id, err.Error())
		for _, v := range f.Voters[1:] {
			_ = s.ask(v.Addr, v.Id, func(ctx context.Context, c pb.PeersClient) error { _, err := c.Release(ctx, f); return err })
		}
		return
	}
	s.beginCluster(f)
}

// askPromises asks everyone but this server itself.
func (s *Store) askPromises(f *pb.Formation) error {
	errs := make([]error, len(f.Voters))
	var asking sync.WaitGroup
	for i, v := range f.Voters[1:] {
		asking.Go(func() {
			errs[i] = s.ask(v.Addr, v.Id, func(ctx context.Context, c pb.PeersClient) error { _, err := c.Promise(ctx, f); return err })
		})
	}
	asking.Wait()
	return errors.Join(errs...)
}

// beginCluster makes the formation's servers the voters of a new cluster.
func (s *Store) beginCluster(f *pb.Formation) {
	var conf raft.Configuration
	for _, v := range f.Voters {
		conf.Servers = append(conf.Servers, raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(v.Id), Address: raft.ServerAddress(v.Addr)})
	}
	if err := s.settle(func() error { return s.raft.BootstrapCluster(conf).Error() }); err != nil {
		s.log.Error("cannot begin the cluster", "error", err)
		return
	}
	if err := s.member.belong(f.Id); err != nil {
		s.fail(err)
		return
	}
	s.log.Info("began a new cluster", "cluster", f.Id, "servers", len(f.Voters))
	s.clients.drop()
	s.campaign()
}

// promise answers an initiator.
func (s *Store) promise(f *pb.Formation) error {
	if int(f.Expect) != s.cfg.BootstrapExpect || len(f.Voters) != s.cfg.BootstrapExpect {
		return fmt.Errorf("this server expects %d servers to begin a cluster, not %d", s.cfg.BootstrapExpect, f.Expect)
	}
	if s.begun() {
		return errors.New("this server belongs to a cluster already")
	}
	for _, v := range f.Voters {
		if a := s.circle.get(v.Id); v.Id != string(s.id) && (a.addr != v.Addr || a.intro.GetMember()) {
			return fmt.Errorf("this server does not know server %s at %s yet", v.Id, v.Addr)
		}
	}
	return s.member.bind(f)
}

// beMember notes the cluster's ID, and joins again when the cluster has lost this
// server or knows it by another address.
func (s *Store) beMember() {
	id := s.member.cluster()
	if meta := s.State().Snapshot().ClusterMeta(nil); meta != nil {
		id = meta.ClusterID
	}
	conf := s.configuration()
	if id != "" && len(conf.Servers) > 0 {
		if err := s.member.belong(id); err != nil {
			s.fail(err)
			return
		}
	}
	at := slices.IndexFunc(conf.Servers, func(m raft.Server) bool { return m.ID == s.id })
	_, heard := s.Leader()
	if at >= 0 && string(conf.Servers[at].Address) == s.Addr() && heard != "" {
		s.refreshRecord()
		return
	}
	if s.IsLeader() {
		s.moveAddress()
		return
	}
	for _, a := range s.circle.all() {
		if a.intro == nil || a.intro.ClusterId == "" || a.intro.ClusterId != id || a.intro.LeaderId == "" || time.Since(a.met) > 2*meetLongest {
			continue
		}
		if at >= 0 && string(conf.Servers[at].Address) == s.Addr() && !s.out() {
			return // the leader is only not heard at the moment
		}
		ctx, cancel := context.WithTimeout(s.ending, joinTimeout)
		err := s.askToJoin(ctx, a.addr)
		cancel()
		if err != nil && s.ending.Err() == nil && s.circle.rarely(err.Error()) {
			s.log.Warn("this server cannot take its place in the cluster", "through", a.addr, "error", err)
		}
		return
	}
}

// out says whether the leader has not been heard for long.
func (s *Store) out() bool {
	last := s.LastContact()
	return last < 0 || last > 3*s.cfg.Heartbeat
}

// refreshRecord keeps this server's record in the state true.
func (s *Store) refreshRecord() {
	self, old := s.self(), s.State().Snapshot().Server(nil, string(s.id))
	self.Start = "" // only told, and noted of those who leave
	if old != nil && old.Left {
		return // the leader notes it when this server joins again
	}
	if old != nil {
		self.CreateIndex, self.ModifyIndex = old.CreateIndex, old.ModifyIndex
		if *self == *old {
			return
		}
	}
	ctx, cancel := context.WithTimeout(s.ending, s.cfg.LeaderWait)
	defer cancel()
	if err := s.note(ctx, &cluster.RegisterServer{Server: self}); err != nil && s.ending.Err() == nil {
		s.log.Debug("could not register this server; trying again", "error", err)
	}
}
