package api

import (
	"context"
	"net/http"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Device is one device of a node as operators see it.
type Device struct {
	ID, Group         string // the group is VENDOR/TYPE/NAME
	Healthy           bool   // whether work is given to it
	HealthDescription string
	UnhealthySince    cluster.Time
	Order             *cluster.DeviceOrder // an operator's, nil for none
	Allocations       []string             // that hold it, wholly or in part
}

// DeviceOrder asks for a change of an operator's order about a device: cluster.DeviceCordon,
// cluster.DeviceTrust, or "" to end it.
type DeviceOrder struct {
	Device, Order, Reason string
	Move                  bool
}

// NodeInterruption asks to empty a node that will be gone.
type NodeInterruption struct {
	Deadline time.Duration // from now; in nanoseconds
	Reason   string
}

func (s *Server) listDevices(r *request) (any, error) {
	id, err := wholeUUID(r.params["id"], "node")
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		n := snap.Node(ws, id)
		if n == nil {
			return missing(snap, ws, cluster.TableNodes, "node not found")
		}
		holders := map[string][]string{}
		for _, a := range snap.AllocsHolding(ws, id) {
			a.AllocatedResources.Devices(func(device string) bool {
				holders[device] = append(holders[device], a.ID)
				return true
			})
		}
		list := []*Device{}
		for _, g := range n.NodeResources.Devices {
			for _, d := range g.Instances {
				list = append(list, &Device{
					ID: d.ID, Group: g.ID(), Healthy: d.Healthy, HealthDescription: d.HealthDescription, UnhealthySince: d.UnhealthySince,
					Order: n.DeviceOrders[d.ID], Allocations: holders[d.ID],
				})
			}
		}
		return found{body: list, index: max(n.ModifyIndex, snap.Index(ws, cluster.TableAllocs))}
	})
}

func (s *Server) orderDevice(r *request) (any, error) {
	var req DeviceOrder
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	return s.changeNode(r, func(id string) cluster.Command {
		cmd := &cluster.OrderDevice{NodeID: id, DeviceID: req.Device}
		if req.Order != "" {
			cmd.Order = &cluster.DeviceOrder{Order: req.Order, Move: req.Move, Reason: req.Reason}
		}
		return cmd
	})
}

// maxInterruption bounds the deadline of a node's interruption.
const maxInterruption = 24 * time.Hour

func (s *Server) interruptNode(r *request) (any, error) {
	var req NodeInterruption
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if req.Deadline <= 0 || req.Deadline > maxInterruption {
		return nil, badRequest("deadline %s of an interruption: want more than 0 and at most %s", req.Deadline, maxInterruption)
	}
	if req.Reason == "" {
		req.Reason = "by an operator"
	}
	return s.changeNode(r, func(id string) cluster.Command {
		return &cluster.UpdateDrain{
			NodeID: id, Strategy: &cluster.DrainStrategy{Deadline: req.Deadline, Interrupted: true},
			Meta: map[string]string{cluster.InterruptedBy: req.Reason},
		}
	})
}

// Devices lists the devices of a node.
func (c *Client) Devices(ctx context.Context, nodeID string) (out []*Device, err error) {
	err = c.call(ctx, http.MethodGet, []string{"node", nodeID, "devices"}, nil, &out)
	return out, err
}

// OrderDevice changes an operator's order about a device of a node.
func (c *Client) OrderDevice(ctx context.Context, nodeID string, o *DeviceOrder) error {
	return c.call(ctx, http.MethodPut, []string{"node", nodeID, "devices"}, o, nil)
}

// InterruptNode empties a node that will be gone: new work stays off, batch work moves at
// once, and everything has left by half of the time.
func (c *Client) InterruptNode(ctx context.Context, nodeID string, i *NodeInterruption) error {
	return c.call(ctx, http.MethodPut, []string{"node", nodeID, "interrupt"}, i, nil)
}

// FindNode gives the ID of the one node whose ID begins with the text or whose name it is.
func (c *Client) FindNode(ctx context.Context, text string) (string, error) {
	var nodes []*nodeStub
	if err := c.call(ctx, http.MethodGet, []string{"nodes"}, nil, &nodes); err != nil {
		return "", err
	}
	var found []string
	for _, n := range nodes {
		if n.ID == text {
			return n.ID, nil
		}
		if n.Name == text || len(text) >= 4 && hasPrefix(n.ID, text) {
			found = append(found, n.ID)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return "", cluster.Errorf(cluster.CodeNotFound, "no node has the name %q, or an ID that begins so", text)
	}
	return "", cluster.Errorf(cluster.CodeInvalid, "%q means %d nodes: give a longer prefix of the ID", text, len(found))
}
