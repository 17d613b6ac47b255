package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

func newNodeGPU() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "gpu",
		Short: "List the GPUs and MIG slices of a node, keep work off one, give one back",
		Long: `A GPU that fails is found by its node: it gets no new work, what it had is moved, and
it comes back when it passes a self-test. These commands are the operator's own word about
one device, which outlives agents. A device is what tasks are given: a GPU or a MIG slice.`,
	}
	cmd.AddCommand(newGPUList(), newGPUCordon(), newGPUUncordon())
	return cmd
}

// onNode runs f with the node that the command line names.
func onNode(cmd *cobra.Command, c *clientFlags, node string, f func(client *api.Client, id string) error) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	id, err := client.FindNode(cmd.Context(), node)
	if err != nil {
		return err
	}
	return f(client, id)
}

func newGPUList() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use:   "list NODE",
		Short: "List the devices of a node, what is wrong with them and who holds them",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return onNode(cmd, &c, args[0], func(client *api.Client, id string) error {
				list, err := client.Devices(cmd.Context(), id)
				if err != nil {
					return err
				}
				if c.json {
					return printJSON(cmd.OutOrStdout(), list)
				}
				var rows [][]string
				for _, d := range list {
					health, order := "healthy", "-"
					if !d.Healthy {
						health = d.HealthDescription
					}
					if d.Order != nil {
						if order = d.Order.Order; !d.Order.Healthy {
							order += "; its node says: " + d.Order.HealthDescription
						}
					}
					rows = append(rows, []string{d.ID, d.Group, health, order, strconv.Itoa(len(d.Allocations))})
				}
				return table(cmd.OutOrStdout(), "ID|Group|Health|Order|Allocations", rows)
			})
		},
	}
	c.add(cmd)
	return cmd
}

func newGPUCordon() *cobra.Command {
	var (
		c      clientFlags
		move   bool
		reason string
	)
	cmd := &cobra.Command{
		Use:     "cordon NODE UUID",
		Short:   "Keep new work off a device; with --move take away what it has",
		Example: "  rxvision node gpu cordon gpu-17 GPU-5f1c… -reason 'fan rattles' -move",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return onNode(cmd, &c, args[0], func(client *api.Client, id string) error {
				return client.OrderDevice(cmd.Context(), id, &api.DeviceOrder{Device: args[1], Order: cluster.DeviceCordon, Move: move, Reason: reason})
			})
		},
	}
	c.add(cmd)
	cmd.Flags().BoolVar(&move, "move", false, "move what runs on it elsewhere")
	cmd.Flags().StringVar(&reason, "reason", "", "shown with the device")
	return cmd
}

func newGPUUncordon() *cobra.Command {
	var (
		c     clientFlags
		force bool
	)
	cmd := &cobra.Command{
		Use:   "uncordon NODE UUID",
		Short: "End a cordon; with --force give a device to work that its node finds unhealthy",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return onNode(cmd, &c, args[0], func(client *api.Client, id string) error {
				o := &api.DeviceOrder{Device: args[1]}
				if force {
					o.Order = cluster.DeviceTrust
				}
				return client.OrderDevice(cmd.Context(), id, o)
			})
		},
	}
	c.add(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "also against what the node finds, until it finds something else")
	return cmd
}

func newInterrupt() *cobra.Command {
	var (
		c        clientFlags
		deadline time.Duration
		reason   string
	)
	cmd := &cobra.Command{
		Use:   "interrupt NODE",
		Short: "Empty a node that will be gone soon",
		Long: `Does what a spot node's notice does: the node gets no new work, batch work moves at
once, services within their migrate blocks, and by half of the time everything is told to
leave, so that the other half is for tasks to end in. nomad node drain -disable undoes it.`,
		Example: "  rxvision node interrupt gpu-17 -deadline 2m",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return onNode(cmd, &c, args[0], func(client *api.Client, id string) error {
				if err := client.InterruptNode(cmd.Context(), id, &api.NodeInterruption{Deadline: deadline, Reason: reason}); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "node %s is emptied\n", id)
				return err
			})
		},
	}
	c.add(cmd)
	cmd.Flags().DurationVar(&deadline, "deadline", 2*time.Minute, "when the node goes, from now")
	cmd.Flags().StringVar(&reason, "reason", "", "shown with the node")
	return cmd
}
