package sim

import (
	"fmt"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// What operators do: servers, access control, introduction of nodes.

func (u *user) autopilotConfig(snap *cluster.Snapshot) cluster.Command {
	c := *snap.AutopilotConfig(nil)
	c.MaxTrailingLogs = uint64(u.w.rnd.IntN(1000))
	return &cluster.SetAutopilotConfig{Config: &c, CheckIndex: u.w.chance(500), Index: c.ModifyIndex}
}

// orderDevice says something of a device of some node, or takes that back.
func (u *user) orderDevice(snap *cluster.Snapshot) cluster.Command {
	w := u.w
	n := snap.Node(nil, pick(w, w.nodes).id)
	if n == nil || len(n.NodeResources.Devices) == 0 {
		return nil
	}
	cmd := &cluster.OrderDevice{NodeID: n.ID, DeviceID: pick(w, n.NodeResources.Devices[0].Instances).ID}
	if n.DeviceOrders[cmd.DeviceID] == nil {
		cmd.Order = &cluster.DeviceOrder{Order: []string{cluster.DeviceCordon, cluster.DeviceTrust}[w.rnd.IntN(2)], Move: w.chance(500)}
	}
	return cmd
}

func (u *user) serverID() string { return fmt.Sprintf("server-%d", u.w.rnd.IntN(30)) }

func (u *user) registerServer(*cluster.Snapshot) cluster.Command {
	id := u.serverID()
	return &cluster.RegisterServer{Server: &cluster.Server{
		ID: id, Name: id, Region: "global", RaftAddr: "10.0.0.1:7648", Start: fmt.Sprint(u.w.rnd.IntN(3)),
	}}
}

func (u *user) removeServer(*cluster.Snapshot) cluster.Command {
	return &cluster.RemoveServer{ID: u.serverID(), Left: u.w.chance(800)}
}

func (u *user) clusterMeta(*cluster.Snapshot) cluster.Command {
	return &cluster.SetClusterMeta{ClusterID: fmt.Sprintf("cluster-%d", u.w.rnd.IntN(2))}
}

// token draws a token. Secrets are few, so that some are used twice.
func (u *user) token(kind string) *cluster.ACLToken {
	w := u.w
	t := &cluster.ACLToken{
		AccessorID: w.newID(), SecretHash: fmt.Sprintf("%064x", w.rnd.IntN(200)), Name: "token", Type: kind,
	}
	if kind == cluster.ACLTokenClient {
		t.Policies = []string{u.policyName()}
		if w.chance(500) {
			t.ExpirationTime = w.now + int64(w.between(time.Second, time.Minute))
		}
	}
	return t
}

func (u *user) policyName() string { return fmt.Sprintf("policy-%d", u.w.rnd.IntN(5)) }

func (u *user) bootstrapACL(snap *cluster.Snapshot) cluster.Command {
	cmd := &cluster.BootstrapACL{Token: u.token(cluster.ACLTokenManagement)}
	if u.w.chance(300) {
		cmd.ResetIndex = snap.ACLBootstrapIndex(nil)
	}
	return cmd
}

func (u *user) upsertPolicies(*cluster.Snapshot) cluster.Command {
	return &cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{
		{Name: u.policyName(), Rules: `namespace "default" { policy = "read" }`}, {Name: u.policyName(), Rules: `node { policy = "read" }`},
	}}
}

func (u *user) deletePolicies(*cluster.Snapshot) cluster.Command {
	return &cluster.DeleteACLPolicies{Names: []string{u.policyName(), "unknown"}}
}

func (u *user) upsertTokens(snap *cluster.Snapshot) cluster.Command {
	t := u.token([]string{cluster.ACLTokenClient, cluster.ACLTokenManagement}[u.w.rnd.IntN(2)])
	if known := snap.ACLTokens(nil, ""); len(known) > 0 && u.w.chance(300) {
		t.AccessorID, t.SecretHash = pick(u.w, known).AccessorID, "" // an update
	}
	return &cluster.UpsertACLTokens{Tokens: []*cluster.ACLToken{t}}
}

func (u *user) deleteTokens(snap *cluster.Snapshot) cluster.Command {
	w := u.w
	if w.chance(500) {
		cmd := &cluster.DeleteACLTokens{OnlyExpired: true}
		for _, t := range snap.ExpiredACLTokens(w.now, 10) {
			cmd.AccessorIDs = append(cmd.AccessorIDs, t.AccessorID)
		}
		return cmd
	}
	if known := snap.ACLTokens(nil, ""); len(known) > 0 {
		return &cluster.DeleteACLTokens{AccessorIDs: []string{pick(w, known).AccessorID}}
	}
	return nil
}

// introduce makes an introduction token. Secrets are few, as those of ACL tokens.
func (u *user) introduce(*cluster.Snapshot) cluster.Command {
	w := u.w
	k := &cluster.IntroToken{
		ID: w.newID(), SecretHash: u.introSecret(), Role: []string{cluster.RoleNode, cluster.RoleGateway}[w.rnd.IntN(2)],
		Uses: w.rnd.IntN(3), Replace: w.chance(200), ExpiresTime: w.now + int64(w.between(time.Second, 10*time.Minute)),
	}
	if k.Role == cluster.RoleNode && w.chance(300) {
		k.NodeName = pick(w, w.nodes).String()
	}
	return &cluster.CreateIntroToken{Token: k}
}

func (u *user) introSecret() string { return fmt.Sprintf("%064x", u.w.rnd.IntN(12)) }

// enrol uses a token for a node or a gateway, with one of two keys.
func (u *user) enrol(snap *cluster.Snapshot) cluster.Command {
	w := u.w
	n := pick(w, w.nodes)
	cmd := &cluster.UseIntroToken{
		SecretHash: u.introSecret(), Role: cluster.RoleNode, Name: n.id, NodeName: n.String(), KeyHash: fmt.Sprintf("%064x", w.rnd.IntN(2)),
	}
	if k := snap.IntroTokenBySecret(nil, cmd.SecretHash); k != nil && k.Role == cluster.RoleGateway {
		cmd.Role, cmd.Name, cmd.NodeName = k.Role, fmt.Sprintf("gateway-%d", w.rnd.IntN(3)), ""
	}
	return cmd
}

func (u *user) deleteIntroductions(snap *cluster.Snapshot) cluster.Command {
	w, cmd := u.w, &cluster.DeleteIntroTokens{}
	if known := snap.IntroTokens(nil, ""); len(known) > 0 {
		cmd.IDs = []string{pick(w, known).ID}
	}
	if known := snap.Enrollments(nil, ""); len(known) > 0 && w.chance(500) {
		e := pick(w, known)
		cmd.Enrollments = []cluster.EnrollmentKey{{Role: e.Role, Name: e.Name}}
	}
	return cmd
}
