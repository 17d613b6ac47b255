package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Servers is the region's set of servers. Any server answers; what only the leader
// can tell or do is asked of it.
type Servers interface {
	// Peers lists the servers of the Raft configuration and those known beside it,
	// and the log index that set the configuration.
	Peers() ([]Peer, uint64, error)
	// Remove takes a server out of the Raft configuration.
	Remove(ctx context.Context, id string) error
	// Leave takes this server out of the region; it ends soon after.
	Leave(ctx context.Context) error
	// Transfer makes another voter the leader.
	Transfer(ctx context.Context, id string) error
	// Health is the leader's judgement of every server.
	Health(ctx context.Context) (*ServersHealth, error)
	// Disk says whether this server can write: nil, or why it cannot.
	Disk() error
}

// Peer is one server. Status is alive, failed or left.
type Peer struct {
	ID, Name, Region, Datacenter, Version string
	Address                               string // host:port of Raft
	HTTPAddr, RPCAddr                     string
	Status                                string
	Leader, Voter, Member                 bool // Member: of the Raft configuration
}

// ServersHealth is the region's health: whether all servers are well, and how
// many may fail before it cannot write.
type ServersHealth struct {
	Healthy          bool
	FailureTolerance int
	Leader           string // ID
	Voters           []string
	Servers          []PeerHealth
}

// PeerHealth is one server in the eyes of the leader.
type PeerHealth struct {
	ID, Name, Address   string
	SerfStatus          string // alive, failed or left
	Version             string
	Leader              bool
	LastContact         time.Duration // since the server was heard of; negative: never
	LastTerm, LastIndex uint64
	Healthy, Voter      bool
	StableSince         time.Time
}

// MarshalJSON writes LastContact as Nomad does: 17.684616ms, or never.
func (p PeerHealth) MarshalJSON() ([]byte, error) {
	type plain PeerHealth
	contact := p.LastContact.String()
	if p.LastContact < 0 {
		contact = "never"
	}
	return json.Marshal(struct {
		plain
		LastContact string
	}{plain(p), contact})
}

func (s *Server) peers() ([]Peer, uint64, error) {
	if s.cfg.Servers == nil {
		return nil, 0, notBuilt("this server does not know its peers")
	}
	return s.cfg.Servers.Peers()
}

func (s *Server) statusPeers(*request) (any, error) {
	peers, _, err := s.peers()
	if err != nil {
		return nil, err
	}
	out := []string{}
	for _, p := range peers {
		if p.Member {
			out = append(out, p.Address)
		}
	}
	return out, nil
}

// member is a server as `nomad server members` prints it.
type member struct {
	Name        string
	Addr        string
	Port        uint16
	Tags        map[string]string
	Status      string
	ProtocolMin uint8
	ProtocolMax uint8
	ProtocolCur uint8
	DelegateMin uint8
	DelegateMax uint8
	DelegateCur uint8
}

// protocol is the version of the members' protocol that Nomad's servers report.
const protocol = 2

func (s *Server) member(p Peer) member {
	host, port, err := net.SplitHostPort(p.Address)
	if err != nil {
		host = p.Address
	}
	number, _ := strconv.ParseUint(port, 10, 16) // 0 where the address has none
	return member{
		Name: s.fullName(p), Addr: host, Port: uint16(number), Status: p.Status,
		ProtocolMin: protocol, ProtocolMax: protocol, ProtocolCur: protocol,
		DelegateMin: protocol, DelegateMax: protocol, DelegateCur: protocol,
		Tags: map[string]string{
			"role": "nomad", "region": p.Region, "dc": p.Datacenter, "id": p.ID, "port": port, "rpc_addr": host,
			"http_addr": p.HTTPAddr, "raft_vsn": raftProtocol, "vsn": "1", "build": p.Version,
		},
	}
}

// fullName is NAME.REGION, with the ID where a peer's name is not known.
func (s *Server) fullName(p Peer) string {
	name := p.Name
	if name == "" {
		name = p.ID
	}
	return name + "." + s.cfg.Region
}

type membersReply struct {
	ServerName, ServerRegion, ServerDC string
	Members                            []member
}

func (s *Server) agentMembers(*request) (any, error) {
	peers, _, err := s.peers()
	if err != nil {
		return nil, err
	}
	reply := &membersReply{ServerName: s.cfg.Name, ServerRegion: s.cfg.Region, ServerDC: s.cfg.Datacenter, Members: []member{}}
	for _, p := range peers {
		reply.Members = append(reply.Members, s.member(p))
	}
	return reply, nil
}

// raftServer is a peer as `nomad operator raft list-peers` prints it.
type raftServer struct {
	ID, Node, Address string
	Leader, Voter     bool
	RaftProtocol      string
}

type raftReply struct {
	Servers []raftServer
	Index   uint64
}

func (s *Server) raftConfiguration(r *request) (any, error) {
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	peers, index, err := s.peers()
	if err != nil {
		return nil, err
	}
	reply := &raftReply{Servers: []raftServer{}, Index: index}
	for _, p := range peers {
		if p.Member {
			reply.Servers = append(reply.Servers, raftServer{
				ID: p.ID, Node: s.fullName(p), Address: p.Address, Leader: p.Leader, Voter: p.Voter, RaftProtocol: raftProtocol,
			})
		}
	}
	return reply, nil
}

// findPeer finds the peer that the query names; nil with the text that says
// that there is none.
func (s *Server) findPeer(r *request) (*Peer, string, error) {
	peers, _, err := s.peers()
	if err != nil {
		return nil, "", err
	}
	id, address := r.query.Get("id"), r.query.Get("address")
	if (id == "") == (address == "") {
		return nil, "", badRequest("must specify either an id or an address of a peer")
	}
	for _, p := range peers {
		if p.Member && (id != "" && p.ID == id || address != "" && p.Address == address) {
			return &p, "", nil
		}
	}
	if id != "" {
		return nil, "id " + strconv.Quote(id) + " was not found in the Raft configuration", nil
	}
	return nil, "address " + strconv.Quote(address) + " was not found in the Raft configuration", nil
}

func (s *Server) removePeer(r *request) (any, error) {
	switch p, text, err := s.findPeer(r); {
	case err != nil:
		return nil, err
	case p == nil:
		return nil, refused(notFound("%s", text))
	default:
		return nil, refused(s.cfg.Servers.Remove(r.Context(), p.ID))
	}
}

// transferReply is what `nomad operator raft transfer-leadership` reads.
type transferReply struct {
	From, To struct{ ID, Address string }
	Noop     bool
	Err      *string
}

func (s *Server) transferLeadership(r *request) (any, error) {
	to, text, err := s.findPeer(r)
	switch {
	case err != nil:
		return nil, err
	case to == nil:
		return nil, badRequest("%s", text)
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	reply := new(transferReply)
	reply.From.ID, reply.From.Address = s.cfg.Store.Leader()
	reply.To.ID, reply.To.Address = to.ID, to.Address
	if reply.Noop = to.ID == reply.From.ID; reply.Noop {
		return reply, nil
	}
	if err := s.cfg.Servers.Transfer(r.Context(), to.ID); err != nil {
		return nil, refused(err)
	}
	return reply, nil
}

// autopilotReply is the settings as clients read and write them.
type autopilotReply struct {
	CleanupDeadServers      bool
	LastContactThreshold    string
	MaxTrailingLogs         uint64
	MinQuorum               uint
	ServerStabilizationTime string
	EnableRedundancyZones   bool
	DisableUpgradeMigration bool
	EnableCustomUpgrades    bool
	CreateIndex             uint64
	ModifyIndex             uint64
}

func (s *Server) autopilotConfig(r *request) (any, error) {
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	c := s.cfg.Store.State().Snapshot().AutopilotConfig(nil)
	return &autopilotReply{
		CleanupDeadServers: c.CleanupDeadServers, LastContactThreshold: c.LastContactThreshold.String(),
		MaxTrailingLogs: c.MaxTrailingLogs, MinQuorum: c.MinQuorum, ServerStabilizationTime: c.ServerStabilizationTime.String(),
		CreateIndex: c.CreateIndex, ModifyIndex: c.ModifyIndex,
	}, nil
}

func (s *Server) setAutopilotConfig(r *request) (any, error) {
	var in autopilotReply
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	if in.EnableRedundancyZones || in.EnableCustomUpgrades {
		return nil, notBuilt("redundancy zones and custom upgrades are Nomad Enterprise's")
	}
	contact, err := time.ParseDuration(in.LastContactThreshold)
	if err != nil || contact <= 0 {
		return nil, badRequest("LastContactThreshold %q: want a duration above zero, such as 200ms", in.LastContactThreshold)
	}
	stable, err := time.ParseDuration(in.ServerStabilizationTime)
	if err != nil || stable < 0 {
		return nil, badRequest("ServerStabilizationTime %q: want a duration, such as 10s", in.ServerStabilizationTime)
	}
	cmd := &cluster.SetAutopilotConfig{Config: &cluster.AutopilotConfig{
		CleanupDeadServers: in.CleanupDeadServers, LastContactThreshold: contact, MaxTrailingLogs: in.MaxTrailingLogs,
		MinQuorum: in.MinQuorum, ServerStabilizationTime: stable,
	}}
	if v := r.query.Get("cas"); v != "" {
		index, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			return nil, badRequest("Expect a number for `cas` query string parameter")
		}
		cmd.CheckIndex, cmd.Index = true, index
	}
	res, err := s.cfg.Store.Apply(r.Context(), cmd)
	if err != nil {
		return nil, refused(err)
	}
	return res.Updated, nil
}

func (s *Server) autopilotHealth(r *request) (any, error) {
	if s.cfg.Servers == nil {
		return nil, notBuilt("this server does not know its peers")
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	h, err := s.cfg.Servers.Health(r.Context())
	if err != nil {
		return nil, err
	}
	for i := range h.Servers {
		h.Servers[i].Name = s.fullName(Peer{ID: h.Servers[i].ID, Name: h.Servers[i].Name})
	}
	if !h.Healthy {
		return statusBody{http.StatusTooManyRequests, h}, nil
	}
	return h, nil
}

// stateHash is what servers are compared by.
type stateHash struct {
	Index uint64 // the last log index that changed the state
	Hash  string // of every record
}

// stateHash tells this server's own state in a word: two servers at the same index
// must say the same.
func (s *Server) stateHash(*request) (any, error) {
	snap := s.cfg.Store.State().Snapshot()
	return &stateHash{snap.Index(nil), fmt.Sprintf("%x", snap.Hash())}, nil
}
